"""What the gateway sends to a decoder process, and how long the answer may be."""

import struct

# The number of bytes of the file, which lies in the shared memory.
JOB = struct.Struct("=Q")
# Of the whole answer, which is one packet.
MAX_ANSWER_BYTES = 128 * 1024
MAX_REFUSAL_CHARACTERS = 1000
# Anatomy terms, and notices; at six bytes a character all of them fit into an answer.
MAX_TEXTS = 32
MAX_TEXT_CHARACTERS = 300
