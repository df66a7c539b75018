"""The emulator itself: small kernels, each wrong in one way, and what it says of them (probes.cu)."""

from __future__ import annotations

import re

import pytest

from tests.kernels.emulator.probes import Probes

PROBES = {
    "parting_lanes": "the warp diverges",
    "missing_lane": r"deadlock.*\n.*threads 0-2: __syncwarp at probes.cu",
    "named_barrier_of_two_sizes": "others who arrived have said",
    "named_barrier_left": "ends with 32 of 64 threads at barrier 1",
    "barrier_never_initialised": "is no initialised mbarrier",
    "barrier_not_yet_seen": "a race: thread 0 has initialised|is no initialised mbarrier",
    "one_arrival_too_many": "one arrival too many",
    "barrier_without_fence": "no mbarrier_init_fence since",
    "more_bytes_than_expected": "32 bytes are 16 more than phase 0",
    "fewer_bytes_than_expected": "deadlock.*\n.*0 of 1 arrivals and 16 bytes are missing",
    "copy_outlives_its_cta": "the CTA ends while a copy",
    "two_copies_to_one_place": "a copy to the same place is still in flight",
    "copy_from_past_the_end": r"reads 32 bytes at bytes \+ 16368, which has 16384 bytes",
    "misaligned_word": "is not aligned to 4 bytes",
    "misaligned_vector": "a plain access at probes.cu.* is not aligned to its type",
    "past_shared_memory": "4 bytes at shared address 0x",
    "past_shared_memory_by_pointer": "1 bytes at shared address 0x",
    "past_a_tensor": r"writes 4 bytes at data \+ 256, which has 256 bytes",
    "write_to_an_input": r"writes to bytes \+ 3",
    "two_writers": "a race: writes shared address",
    "two_writers_to_a_tensor": r"a race: writes data \+ 20",
    "registers_that_nobody_gives_back": "deadlock.*\n.*setmaxnreg at probes.cu",
    "growing_to_fewer": "growing to 64 registers, the threads have 168",
    "warpgroup_in_parts": "are one warpgroup, but executed setmaxnreg differently",
    "past_the_cluster": "CTA 2 of a cluster of 2",
    "cluster_barrier_twice": "arrives once more before it has waited",
    "cluster_barrier_not_arrived_at": "waits without having arrived",
    "sending": "^$",
    "sent_before_the_barrier_is_there": "thread 0 has initialised|is no initialised mbarrier|has ended",
    "sent_twice": "a race: writes shared address",
    "read_before_it_is_sent": "a race: (reads|writes) shared address|the CTA ends while a copy|has ended",
    "waited_for_in_the_cta": "waits in the CTA's scope for",
    "receiver_has_left": "has ended|the CTA ends while a copy",
    "sent_with_another_barrier": "is of another CTA than what is stored",
    "product": "^$",
    "product_without_fence": "since the last wgmma.fence",
    "product_without_proxy_fence": "without fence.proxy.async since",
    "product_touched_before_its_wait": "an accumulator was written while wgmma",
}


@pytest.fixture(scope="session")
def probes() -> Probes:
    return Probes()


@pytest.mark.parametrize("name", PROBES)
def test_a_kernel_that_is_wrong_in_one_way(probes: Probes, name: str) -> None:
    """In each of several orders of events."""
    for seed in range(5):
        assert re.search(PROBES[name], probes.run(name, seed)), (seed, probes.run(name, seed))
