"""What may wait, and what is told to come back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit.server.admission import Admission
from quantkit.server.errors import ApiError


def test_sequences_are_bounded_and_come_back():
    admission = Admission(max_sequences=3, max_waiting_tokens=100)
    admission.admit(2, 10)
    with pytest.raises(ApiError) as refused:
        admission.admit(2, 10)
    assert refused.value.status == 429
    assert int(refused.value.headers["Retry-After"]) >= 1
    admission.ended(2)
    admission.admit(3, 10)


def test_time_without_work_says_nothing_of_the_pace(monkeypatch):
    now = 0.0
    monkeypatch.setattr("quantkit.server.admission.time.monotonic", lambda: now)
    admission = Admission(max_sequences=2, max_waiting_tokens=100)

    def retry_after():
        with pytest.raises(ApiError) as refused:
            admission.admit(2, 1)
        return int(refused.value.headers["Retry-After"])

    admission.admit(2, 2)
    admission.ended(1)
    now = 10.0
    admission.admit(1, 1)
    admission.ended(1)
    assert retry_after() == 1 + 10 // 2
    admission.ended(1)  # nothing is left to do
    now = 1000.0
    admission.admit(2, 2)
    admission.ended(1)
    now = 1001.0
    admission.admit(1, 1)
    admission.ended(1)
    assert retry_after() == 1


def test_what_never_fits_is_not_told_to_come_back():
    admission = Admission(max_sequences=3, max_waiting_tokens=100)
    with pytest.raises(ApiError, match=r"4 answers .* at most 3") as refused:
        admission.admit(4, 10)
    assert (refused.value.status, refused.value.param, refused.value.headers) == (400, "n", {})


def test_one_prompt_may_wait_however_long():
    admission = Admission(max_sequences=9, max_waiting_tokens=100)
    admission.admit(1, 1000)
    with pytest.raises(ApiError, match="tokens"):
        admission.admit(1, 1)
    admission.begun(1000)
    admission.admit(1, 60)
    with pytest.raises(ApiError, match="tokens"):
        admission.admit(1, 60)


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 50))))
def test_what_is_counted_in_is_what_waits(requests):
    admission = Admission(max_sequences=10, max_waiting_tokens=60)
    admitted = []
    for num_sequences, num_tokens in requests:
        try:
            admission.admit(num_sequences, num_tokens)
        except ApiError:
            continue
        admitted.append((num_sequences, num_tokens))
    assert admission.num_sequences == sum(count for count, _ in admitted) <= 10
    assert admission.num_waiting_tokens == sum(tokens for _, tokens in admitted) <= 60
