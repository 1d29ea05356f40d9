"""A growing video and a growing conversation -> answers over time, one KV cache."""

from .feed import Feed, FeedOptions, FeedReport
from .records import SessionState, TimedMessage
from .session import StreamingSession

__all__ = ["Feed", "FeedOptions", "FeedReport", "SessionState", "StreamingSession", "TimedMessage"]
