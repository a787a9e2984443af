"""Data: the demo's world of arithmetic, or a user's own files, as corpus, chats and problems."""
