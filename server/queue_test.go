package server

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"

	"nbd/store"
)

// A queueTest starts builds in a queue and records the order in which they
// get their turn.
type queueTest struct {
	t *testing.T
	q *queue

	mu      sync.Mutex
	order   []string
	places  map[string][]string
	release map[string]func()
	wg      sync.WaitGroup
}

func newQueueTest(t *testing.T, total Room) *queueTest {
	return &queueTest{t: t, q: newQueue(total, nil), places: map[string][]string{}, release: map[string]func(){}}
}

// ask asks for a turn and returns when the queue has decided for now.
func (qt *queueTest) ask(ctx context.Context, name string, a store.AccountID, need Room) {
	qt.wg.Go(func() {
		_, release, err := qt.q.acquire(ctx, one(a, need), func(p queuePlace) {
			qt.mu.Lock()
			qt.places[name] = append(qt.places[name], p.String())
			qt.mu.Unlock()
		})
		qt.mu.Lock()
		defer qt.mu.Unlock()
		if err != nil {
			qt.order = append(qt.order, name+": "+err.Error())
			return
		}
		qt.order = append(qt.order, name)
		qt.release[name] = release
	})
	synctest.Wait()
}

// one is what acquire asks for if one account waits.
func one(a store.AccountID, need Room) func() ([]want, <-chan struct{}) {
	need.Guests = 1
	return func() ([]want, <-chan struct{}) { return []want{{account: a, need: need}}, nil }
}

func (qt *queueTest) end(name string) {
	qt.t.Helper()
	qt.mu.Lock()
	release := qt.release[name]
	qt.mu.Unlock()
	if release == nil {
		qt.t.Fatalf("%s does not run; so far: %v", name, qt.order)
	}
	release()
	synctest.Wait()
}

func (qt *queueTest) want(names ...string) {
	qt.t.Helper()
	qt.mu.Lock()
	defer qt.mu.Unlock()
	if !slices.Equal(qt.order, names) {
		qt.t.Fatalf("order %v, want %v", qt.order, names)
	}
}

var small = Room{MemoryMiB: 1, CPUs: 1}

func TestQueueIsFairBetweenAccounts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		qt := newQueueTest(t, Room{Guests: 2, MemoryMiB: 100, CPUs: 100})
		for i := range 5 {
			qt.ask(t.Context(), fmt.Sprintf("a%d", i), 1, small)
		}
		qt.want("a0", "a1")
		qt.ask(t.Context(), "b0", 2, small)
		qt.ask(t.Context(), "b1", 2, small)
		qt.ask(t.Context(), "c0", 3, small)
		qt.end("a0") // a runs one, b and c none; b asked first
		qt.want("a0", "a1", "b0")
		qt.end("a1")
		qt.want("a0", "a1", "b0", "c0")
		qt.end("b0") // nobody but c runs: a was served before b
		qt.want("a0", "a1", "b0", "c0", "a2")
		qt.end("a2")
		qt.want("a0", "a1", "b0", "c0", "a2", "b1")
		qt.end("c0")
		qt.want("a0", "a1", "b0", "c0", "a2", "b1", "a3")
		qt.end("b1")
		qt.want("a0", "a1", "b0", "c0", "a2", "b1", "a3", "a4")
		qt.end("a3")
		qt.end("a4")
		qt.wg.Wait()
		if s := qt.q.status(); s.Running != 0 || s.Waiting != 0 || s.Free != s.Total || len(qt.q.accounts) != 0 {
			t.Errorf("something is left: %+v", s)
		}
	})
}

func TestQueueBounds(t *testing.T) {
	for _, c := range []struct {
		name  string
		total Room
		lacks string
	}{
		{"guests", Room{Guests: 2, MemoryMiB: 100, CPUs: 100}, "guests"},
		{"memory", Room{Guests: 100, MemoryMiB: 25, CPUs: 100}, "memory"},
		{"CPUs", Room{Guests: 100, MemoryMiB: 100, CPUs: 5}, "CPUs"},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				qt := newQueueTest(t, c.total)
				need := Room{MemoryMiB: 10, CPUs: 2}
				qt.ask(t.Context(), "1", 1, need)
				qt.ask(t.Context(), "2", 1, need)
				qt.ask(t.Context(), "3", 1, need)
				qt.want("1", "2")
				if want := []string{"waiting for free " + c.lacks + ": next in the queue"}; !slices.Equal(qt.places["3"], want) {
					t.Errorf("told %q, want %q", qt.places["3"], want)
				}
				qt.end("1")
				qt.want("1", "2", "3")
				qt.end("2")
				qt.end("3")
				qt.wg.Wait()
			})
		})
	}
}

func TestQueueRefusesWhatNeverFits(t *testing.T) {
	q := newQueue(Room{Guests: 1, MemoryMiB: 10, CPUs: 10}, nil)
	_, _, err := q.acquire(t.Context(), one(1, Room{MemoryMiB: 11}), nil)
	var large *errTooLarge
	if !errors.As(err, &large) || large.lacks != "memory" {
		t.Errorf("error %v", err)
	}
}

func TestQueueTellsPlaces(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		qt := newQueueTest(t, Room{Guests: 1, MemoryMiB: 100, CPUs: 100})
		for i := range 10 {
			qt.ask(t.Context(), fmt.Sprint(i), 1, small)
		}
		for i := range 10 {
			qt.end(fmt.Sprint(i))
		}
		qt.wg.Wait()
		want := []string{
			"waiting for free guests: 8 builds are ahead",
			"waiting for free guests: 4 builds are ahead",
			"waiting for free guests: 2 builds are ahead",
			"waiting for free guests: 1 build is ahead",
			"waiting for free guests: next in the queue",
		}
		if !slices.Equal(qt.places["9"], want) {
			t.Errorf("told %q, want %q", qt.places["9"], want)
		}
	})
}

func TestQueueLargeBuildsDoNotStarve(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		qt := newQueueTest(t, Room{Guests: 100, MemoryMiB: 10, CPUs: 1000})
		qt.ask(t.Context(), "s0", 1, Room{MemoryMiB: 5})
		qt.ask(t.Context(), "large", 2, Room{MemoryMiB: 10})
		last := "s0"
		for i := 1; ; i++ {
			name := fmt.Sprintf("s%d", i)
			qt.ask(t.Context(), name, 1, Room{MemoryMiB: 5})
			if qt.release[name] == nil {
				if i != maxPassed+1 {
					t.Fatalf("passed %d times, want %d", i-1, maxPassed)
				}
				qt.end(last)
				break
			}
			qt.end(last)
			last = name
		}
		if qt.release["large"] == nil {
			t.Fatal("the large build did not start")
		}
		qt.end("large")
		qt.end(fmt.Sprintf("s%d", maxPassed+1))
		qt.wg.Wait()
	})
}

func TestQueueLeave(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		qt := newQueueTest(t, Room{Guests: 1, MemoryMiB: 10, CPUs: 10})
		gone := errors.New("gone")
		ctx, cancel := context.WithCancelCause(t.Context())
		qt.ask(t.Context(), "1", 1, small)
		qt.ask(ctx, "2", 1, small)
		qt.ask(t.Context(), "3", 2, small)
		cancel(gone)
		synctest.Wait()
		qt.want("1", "2: gone")
		qt.end("1")
		qt.want("1", "2: gone", "3")
		qt.end("3")
		qt.wg.Wait()
		if s := qt.q.status(); s.Free != s.Total {
			t.Errorf("room was lost: %+v", s)
		}
	})
}

// A build for which several accounts wait has the best of their places, and
// starts with the most that one of them wants and that is free.
func TestQueueOfSharedBuilds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		qt := newQueueTest(t, Room{Guests: 1, MemoryMiB: 100, CPUs: 100})
		qt.ask(t.Context(), "a0", 1, small)
		qt.ask(t.Context(), "a1", 1, small)
		qt.ask(t.Context(), "a2", 1, small)
		// The build of account 1 that is last in its queue gets company.
		var mu sync.Mutex
		members := []want{{account: 1, build: 7, need: Room{Guests: 1, MemoryMiB: 10, CPUs: 1}}}
		changed := make(chan struct{})
		wants := func() ([]want, <-chan struct{}) {
			mu.Lock()
			defer mu.Unlock()
			return slices.Clone(members), changed
		}
		change := func(list ...want) {
			mu.Lock()
			members = list
			old := changed
			changed = make(chan struct{})
			mu.Unlock()
			close(old)
			synctest.Wait()
		}
		var got want
		qt.wg.Go(func() {
			w, release, err := qt.q.acquire(t.Context(), wants, func(queuePlace) {})
			qt.mu.Lock()
			defer qt.mu.Unlock()
			if err != nil {
				t.Error(err)
				return
			}
			got = w
			qt.order = append(qt.order, "shared")
			qt.release["shared"] = release
		})
		synctest.Wait()
		first := members[0]
		second := want{account: 2, build: 8, need: Room{Guests: 1, MemoryMiB: 50, CPUs: 4}}
		never := want{account: 3, build: 9, need: Room{Guests: 1, MemoryMiB: 1000, CPUs: 4}}
		place := func(build store.BuildID) int {
			for _, b := range qt.q.waiting() {
				if b.Build == build {
					return b.Ahead
				}
			}
			return -1
		}
		if place(7) != 2 {
			t.Errorf("place %d alone", place(7))
		}
		change(first, second, never)
		if place(7) != 0 || place(8) != 0 || place(9) != -1 {
			t.Errorf("places %d, %d, %d", place(7), place(8), place(9))
		}
		change(first) // the second one leaves
		if place(7) != 2 || place(8) != -1 {
			t.Errorf("places %d, %d", place(7), place(8))
		}
		change(first, second)
		if s := qt.q.status(); s.Waiting != 3 || s.Running != 1 {
			t.Errorf("status %+v", s)
		}
		qt.end("a0")
		qt.want("a0", "shared")
		if got.account != 2 || got.need != second.need {
			t.Errorf("it was given %+v", got)
		}
		qt.end("shared")
		qt.end("a1")
		qt.end("a2")
		qt.want("a0", "shared", "a1", "a2")
		if s := qt.q.status(); s.Free != s.Total || len(qt.q.accounts) != 0 {
			t.Errorf("left: %+v", s)
		}
		qt.wg.Wait()
	})
}

// A build that could start at once does so, though one who waits for it wants
// more than is free.
func TestQueueLargeWishDelaysNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := newQueue(Room{Guests: 10, MemoryMiB: 100, CPUs: 100}, nil)
		_, release, err := q.acquire(t.Context(), one(1, Room{MemoryMiB: 60}), nil)
		if err != nil {
			t.Fatal(err)
		}
		got, release2, err := q.acquire(t.Context(), func() ([]want, <-chan struct{}) {
			return []want{{account: 1, need: Room{Guests: 1, MemoryMiB: 30}}, {account: 2, need: Room{Guests: 1, MemoryMiB: 80}}}, nil
		}, nil)
		if err != nil || got.need.MemoryMiB != 30 {
			t.Errorf("got %+v, %v", got, err)
		}
		release()
		release2()
		if s := q.status(); s.Free != s.Total || len(q.accounts) != 0 {
			t.Errorf("left: %+v", s)
		}
	})
}

func TestQueueClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		qt := newQueueTest(t, Room{Guests: 1, MemoryMiB: 10, CPUs: 10})
		qt.ask(t.Context(), "runs", 1, small)
		qt.ask(t.Context(), "waits", 2, small)
		qt.q.close()
		synctest.Wait()
		qt.want("runs", "waits: "+errEnding.Error())
		qt.end("runs")
		qt.ask(t.Context(), "late", 1, small)
		qt.want("runs", "waits: "+errEnding.Error(), "late: "+errEnding.Error())
		qt.wg.Wait()
	})
}
