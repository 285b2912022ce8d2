"""What is learned: keys and values, how they are parameterised, and where they start."""
