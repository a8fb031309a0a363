"""Which steps of a rollout are stochastic, and which of these are trained."""

from postgen.grpo.window import Window


def test_grpo_window_strategies():
    def window(**changes):
        base = {"size": 2, "first": 1, "stop": 6, "strategy": "random", "interval": 3, "kept": 2, "seed": 5}
        return Window(**{**base, **changes})

    assert {window(strategy="fixed").start(number) for number in range(9)} == {1}
    assert [window(strategy="progressive").start(number) for number in range(0, 18, 3)] == [1, 2, 3, 4, 1, 2]
    assert [window(strategy="progressive").start(number) for number in range(4)] == [1, 1, 1, 2]
    drawn = [window().start(0, prompt) for prompt in range(60)]
    assert set(drawn) == {1, 2, 3, 4}
    assert drawn == [window().start(0, prompt) for prompt in range(60)]
    assert drawn != [window().start(1, prompt) for prompt in range(60)]
    assert drawn != [window(seed=6).start(0, prompt) for prompt in range(60)]
    kept = window(size=10, stop=11, kept=6)
    orders = [kept.trained(0, sample).tolist() for sample in range(5)]
    assert all(len(set(order)) == 6 and max(order) < 10 for order in orders)
    assert len({tuple(order) for order in orders}) > 1
    assert window().trained(0, 0).tolist() == [0, 1]
