"""Albums: folders whose pictures can be found by what they show."""
