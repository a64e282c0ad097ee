"""What an experiment learns from: files, slices, crops, augmentation, phantoms, converters."""
