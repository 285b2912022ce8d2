"""The paper's experiments: methods side by side, recipes of its tables, and pages made of the results."""
