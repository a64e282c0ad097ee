"""What the segmentation examples share: data, augmentation, networks, training, evaluation, figures."""
