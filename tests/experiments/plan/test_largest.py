"""The largest batch, by the line through two plans and a look at the answer."""

from experiments.plan.plan import find_largest


def search(total, known=None, *, multiple=4, memory=100):
    """What is found, and which batches were looked at."""
    asked = []

    def counted(size):
        asked.append(size)
        return total(size)

    return find_largest("prompts", counted, multiple, memory, known), asked


def test_a_line_is_right_at_once():
    found, asked = search(lambda size: 20 + 2 * size)
    assert (found.size, found.need) == (40, 100)
    assert asked == [4, 8, 40]


def test_what_is_known_is_not_asked_again():
    found, asked = search(lambda size: 20 + 2 * size, known=(16, 52))
    assert found.size == 40
    assert asked == [4, 40]


def test_a_curve_is_followed_down():
    found, asked = search(lambda size: 20 + 2 * size + (10 if size > 30 else 0))
    assert (found.size, found.need) == (32, 94)
    assert asked[:3] == [4, 8, 40]
    assert len(asked) <= 6


def test_a_compiler_without_room_makes_it_smaller():
    found, _ = search(lambda size: None if size > 33 else 20 + 2 * size)
    assert (found.size, found.need) == (32, 84)


def test_nothing_fits():
    found, asked = search(lambda size: 101)
    assert (found.size, found.need) == (0, 101)
    assert asked == [4]
    assert search(lambda size: None)[0].need is None


def test_only_the_smallest_fits():
    found, _ = search(lambda size: 90 if size == 4 else None)
    assert (found.size, found.need) == (4, 90)
