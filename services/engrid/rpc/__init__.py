"""What every process of Engrid shares on the wire: errors, channels, servers, and the hot messages' frames."""

import os

# Before gRPC is first used. Its own handlers of fork would stop its threads in the parent at each fork, be skipped where a
# call is under way, which is always with a stream open, and say so on stderr. What we do instead: forks.py.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
