"""One short file per run: set up in labelled paragraphs, then the loop, then the finished model."""
