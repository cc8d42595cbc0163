"""What a trained model is judged by: tasks, what they ask of a model, and how its answers become figures."""
