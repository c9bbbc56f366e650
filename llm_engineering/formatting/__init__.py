"""Rendering and label masks: from messages to token ids."""
