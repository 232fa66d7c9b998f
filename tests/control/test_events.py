"""What operators can look back at."""

from triptych.control.events import KEPT, Event, EventLog


def test_the_newest_events_of_each_sort_are_kept_in_order() -> None:
    log = EventLog()
    log.add(Event(what="lost", text="long ago"))
    for number in range(3 * KEPT):
        log.add(Event(what="decision", numbers={"number": number}))
    log.add(Event(what="lost", text="now"))
    events = list(log)
    assert [event.text for event in events if event.what == "lost"] == ["long ago", "now"]
    assert [event.numbers["number"] for event in events[1:-1]] == list(range(2 * KEPT, 3 * KEPT))
