"""The instrument itself: known allocations, expected bytes."""

import gc

import torch

from lowmem.live_bytes import LiveBytes

MIB = 2**20


def test_counts_an_allocation_and_its_release():
    with LiveBytes() as meter:
        x = torch.zeros(MIB, dtype=torch.float32)
        assert meter.live_bytes == 4 * MIB
        y = torch.ones(MIB, dtype=torch.int64)
        assert meter.live_bytes == 12 * MIB
        del x
        assert meter.live_bytes == 8 * MIB
        del y
    assert meter.live_bytes == 0 and meter.peak_bytes == 12 * MIB


def test_a_view_costs_nothing_and_keeps_its_storage():
    with LiveBytes() as meter:
        view = torch.zeros(1024, 256).t()[3:5]
        assert meter.live_bytes == meter.peak_bytes == MIB
        assert view.shape == (2, 1024)


def test_peak_is_kept_by_phase():
    with LiveBytes("first") as meter:
        kept = torch.zeros(MIB)
        torch.zeros(MIB)
        meter.phase = "second"
        torch.zeros(2 * MIB)
    assert kept.shape and meter.peak_bytes_by_phase == {"first": 8 * MIB, "second": 12 * MIB}
    assert (meter.peak_bytes, meter.peak_phase) == (12 * MIB, "second")


def test_a_resized_storage_is_counted_anew():
    with LiveBytes() as meter:
        x = torch.empty(10)
        x.resize_(1000)
        assert meter.live_bytes == 4000


def test_tracked_parameters_count_once():
    layer = torch.nn.Linear(16, 16)
    meter = LiveBytes()
    meter.track(layer.parameters())
    meter.track(layer.parameters())
    with meter:
        layer.weight.detach().t()
    assert meter.live_bytes == 4 * (16 * 16 + 16)


def test_backward_gradients_are_seen():
    weight = torch.ones(MIB, requires_grad=True)
    with LiveBytes() as meter:
        y = weight * 2
        (y * y).sum().backward()
        del y
        assert 4 * MIB <= meter.live_bytes < 5 * MIB  # the gradient
    assert meter.peak_bytes >= 8 * MIB  # y, kept for the backward, and its square


def test_an_address_used_again_is_not_confused():
    """Storages of the same size tend to get the same address: the count must not drift."""
    with LiveBytes() as meter:
        for _ in range(200):
            x = torch.empty(1000)
            y = x + 1
            del x
        assert meter.live_bytes == 4000 and y.shape
        del y
        gc.collect()
        assert meter.live_bytes == 0


def test_another_device_does_not_count():
    with LiveBytes(device="meta") as meter:
        on_the_host, counted = torch.ones(100), torch.ones(25, device="meta")
    assert meter.live_bytes == meter.peak_bytes == 100
    assert on_the_host.numel() == 4 * counted.numel()
