"""What every implementation of the ops computes, each case once.

An implementation plugs in by a class in its own test file that says which it is and what it takes:

    class TestPallas(mLSTM):
        implementation, dtypes, options = "pallas", ["float32", "bfloat16"], {"chunk_size": 16}
"""
