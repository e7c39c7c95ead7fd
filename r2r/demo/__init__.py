"""The demo: a small model is trained here, on photos that come with packages, and what it restores is shown."""
