"""Watching films, cameras and screens, and telling in words what they show."""
