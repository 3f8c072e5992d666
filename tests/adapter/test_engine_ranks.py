from __future__ import annotations

from gora_serve.adapter.engine_ranks import bucket_of


def test_buckets_are_those_of_the_engine() -> None:
    assert [bucket_of(rank) for rank in (1, 2, 8, 9, 257, 321, 512, 513)] == [1, 8, 8, 16, 320, 512, 512, None]
