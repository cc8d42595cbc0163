"""A page on which both frameworks continue one prompt side by side; only `app` imports Gradio."""
