"""A chat page and OpenAI's API for one model: python sample.py --serve=8000.

Read server.py first (HTTP, and the queue of requests), then api.py (OpenAI's format), page.html.
"""
