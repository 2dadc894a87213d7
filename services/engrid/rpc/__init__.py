"""What every process of Engrid shares on the wire: errors, channels, servers, and the hot messages' frames."""
