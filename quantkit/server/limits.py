"""Every bound on what a client can make the server hold or do. What generation itself bounds is in `SamplingParams`."""

MAX_BODY_BYTES = 4 << 20  # a prompt of 500,000 token ids
MAX_BODIES_BYTES = 256 << 20  # of all requests together, from the first byte of a body until its answer ends
BODY_SECONDS = 30.0  # for a body to arrive
MAX_HEADER_BYTES = 16 << 10  # request line and headers
BACKLOG = 2048  # of connections that nobody has accepted
MAX_PROMPTS = 128  # of one completion request
MAX_MESSAGES = 4096
MAX_TOOLS = 128
GRAMMAR_SECONDS = 2.0  # to find out whether a grammar can be compiled
MAX_GRAMMARS_WAITING = 64  # to be looked at
NUM_GRAMMARS_KNOWN = 1024  # to be fine
MAX_BEHIND_TOKENS = 1 << 14  # that a stream's reader may be behind, each of the likeliest ones counted
MAX_WHOLE_TOKENS = 1 << 20  # of an answer that is not streamed, each of the likeliest ones counted
KEEP_ALIVE_SECONDS = 75  # of a connection without requests; proxies keep theirs for 60, and close them first
SEND_SECONDS = 60.0  # for a client to take one piece of a stream
MAX_REQUEST_ID_CHARS = 128
MAX_USER_CHARS = 256
TOKENIZER_THREADS = 2
