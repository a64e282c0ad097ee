"""The networks of the field's recipes, and what methods attach to them."""
