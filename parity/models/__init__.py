"""Models of either framework behind one interface: their weights by name, what they compute value by value, gradients."""
