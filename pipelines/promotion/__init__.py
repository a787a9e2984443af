"""The way of a model into what is served: comparison with the champion, page, commit or request in Git."""
