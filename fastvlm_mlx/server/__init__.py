"""Answers over HTTP: the APIs that other programs speak, on one engine."""
