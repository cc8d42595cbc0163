"""From text to batches: corpora, tokenizers, token files, and the order in which training reads them."""
