"""A growing video and a growing conversation -> answers over time, one KV cache."""

from .feed import Feed, FeedOptions, FeedReport
from .session import SessionState, StreamingSession, TimedMessage

__all__ = ["Feed", "FeedOptions", "FeedReport", "SessionState", "StreamingSession", "TimedMessage"]
