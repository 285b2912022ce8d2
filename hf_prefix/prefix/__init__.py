"""What is learned: keys and values, and how they are parameterised."""
