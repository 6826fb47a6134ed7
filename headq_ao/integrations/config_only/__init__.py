"""What is known of a model from its config alone; transformers' modelling code is not imported for it."""
