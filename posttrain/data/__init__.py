"""Rows in, typed records out: reading, checking, chat templates, loss masks, packing. Never starts a process."""
