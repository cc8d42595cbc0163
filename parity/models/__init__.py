"""Models of either framework behind one interface: weights by name, values in order of computation, gradients."""
