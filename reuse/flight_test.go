package reuse

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"
)

type flight = Flight[string, string, int]

var id1 = FlightID{Scope: 1, Key: Key{1}}

// all receives every event and the result.
func all(t *testing.T, w *Waiter[string, string, int]) (events []string, r int) {
	t.Helper()
	for {
		e, r, ok, err := w.Next(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if !ok {
			return events, r
		}
		events = append(events, e)
	}
}

func mustJoin(t *testing.T, g *Flights[string, string, int], id FlightID, run func(*flight) int) (*Waiter[string, string, int], bool) {
	t.Helper()
	w, started, err := g.Join(id, "", run)
	if err != nil {
		t.Fatal(err)
	}
	return w, started
}

func TestFlightTellsEachWaiterFromTheBeginning(t *testing.T) {
	g := NewFlights[string, string, int](t.Context(), nil)
	defer g.Close()
	told, land := make(chan struct{}), make(chan struct{})
	run := func(f *flight) int {
		f.Tell("one")
		f.Tell("two")
		close(told)
		<-land
		f.Tell("three")
		return 7
	}
	w1, started := mustJoin(t, g, id1, run)
	if !started {
		t.Error("first request did not start the flight")
	}
	<-told
	w2, started := mustJoin(t, g, id1, nil)
	if started {
		t.Error("second request started a flight")
	}
	other, started := mustJoin(t, g, FlightID{Scope: 2, Key: id1.Key}, func(*flight) int { return 8 })
	if !started {
		t.Error("another scope joined")
	}
	close(land)
	for _, w := range []*Waiter[string, string, int]{w1, w2} {
		events, r := all(t, w)
		if diff := cmp.Diff([]string{"one", "two", "three"}, events); diff != "" || r != 7 {
			t.Errorf("result %d, events: %s", r, diff)
		}
		w.Leave(nil)
	}
	if _, r := all(t, other); r != 8 {
		t.Errorf("other scope: result %d", r)
	}
	other.Leave(nil)
}

func TestLeavingDoesNotEndItForOthers(t *testing.T) {
	g := NewFlights[string, string, int](t.Context(), nil)
	defer g.Close()
	land := make(chan struct{})
	run := func(f *flight) int {
		select {
		case <-land:
			return 1
		case <-f.Context().Done():
			return -1
		}
	}
	w1, _ := mustJoin(t, g, id1, run)
	w2, _ := mustJoin(t, g, id1, nil)
	w1.Leave(nil)
	w1.Leave(nil) // counts once
	close(land)
	if _, r := all(t, w2); r != 1 {
		t.Errorf("result %d, want 1", r)
	}
	w2.Leave(nil)
}

func TestLastOneToLeaveCancels(t *testing.T) {
	g := NewFlights[string, string, int](t.Context(), nil)
	defer g.Close()
	ended, release := make(chan error), make(chan struct{})
	w1, _ := mustJoin(t, g, id1, func(f *flight) int {
		<-f.Context().Done()
		ended <- context.Cause(f.Context())
		<-release
		return -1
	})
	w2, _ := mustJoin(t, g, id1, nil)
	w1.Leave(nil)
	w2.Leave(nil)
	if err := <-ended; !errors.Is(err, ErrAbandoned) {
		t.Errorf("cause %v", err)
	}
	// It has not ended yet, and cannot be joined all the same.
	w3, started := mustJoin(t, g, id1, func(*flight) int { return 3 })
	if !started {
		t.Error("joined a cancelled flight")
	}
	select {
	case <-w2.Landed():
		t.Error("landed before it ended")
	default:
	}
	close(release)
	<-w2.Landed()
	<-w1.Landed()
	if _, r := all(t, w3); r != 3 {
		t.Errorf("result %d, want 3", r)
	}
	w3.Leave(nil)
}

func TestNextEndsWithItsContext(t *testing.T) {
	g := NewFlights[string, string, int](t.Context(), nil)
	defer g.Close()
	w, _ := mustJoin(t, g, id1, func(f *flight) int { <-f.Context().Done(); return 0 })
	defer w.Leave(nil)
	ctx, cancel := context.WithCancelCause(t.Context())
	gone := errors.New("gone")
	cancel(gone)
	if _, _, _, err := w.Next(ctx); !errors.Is(err, gone) {
		t.Errorf("error %v", err)
	}
}

func TestStartIsNotJoined(t *testing.T) {
	g := NewFlights[string, string, int](t.Context(), nil)
	defer g.Close()
	land := make(chan struct{})
	w1, err := g.Start("", func(*flight) int { <-land; return 1 })
	if err != nil {
		t.Fatal(err)
	}
	w2, started := mustJoin(t, g, FlightID{}, func(*flight) int { return 2 })
	if !started {
		t.Error("joined a flight of its own")
	}
	if _, r := all(t, w2); r != 2 {
		t.Errorf("result %d", r)
	}
	close(land)
	if _, r := all(t, w1); r != 1 {
		t.Errorf("result %d", r)
	}
	w1.Leave(nil)
	w2.Leave(nil)
}

func TestDrainAndClose(t *testing.T) {
	g := NewFlights[string, string, int](t.Context(), nil)
	land := make(chan struct{})
	w, _ := mustJoin(t, g, id1, func(f *flight) int {
		select {
		case <-land:
			return 1
		case <-f.Context().Done():
			if !errors.Is(context.Cause(f.Context()), ErrClosed) {
				t.Errorf("cause %v", context.Cause(f.Context()))
			}
			return 2
		}
	})
	short, cancel := context.WithCancel(t.Context())
	cancel()
	if err := g.Drain(short); err == nil {
		t.Error("Drain ended before the flight")
	}
	if _, _, err := g.Join(id1, "", nil); !errors.Is(err, ErrClosed) {
		t.Errorf("join while draining: %v", err)
	}
	if _, err := g.Start("", nil); !errors.Is(err, ErrClosed) {
		t.Errorf("start while draining: %v", err)
	}
	g.Close()
	if _, r := all(t, w); r != 2 {
		t.Errorf("result %d, want that of a cancelled flight", r)
	}
	w.Leave(nil)
	if err := g.Drain(t.Context()); err != nil {
		t.Error(err)
	}
}

// Many come and go; each who stays gets the result of a flight that ran, and
// no two flights with one id run at once unless the first was cancelled.
func TestFlightsUnderLoad(t *testing.T) {
	g := NewFlights[string, string, int](t.Context(), nil)
	defer g.Close()
	var running atomic.Int32
	run := func(f *flight) int {
		f.Tell("begin")
		if n := running.Add(1); n > 1 {
			t.Errorf("%d flights at once", n)
		}
		for range 3 {
			f.Tell("more")
		}
		running.Add(-1)
		return 1
	}
	var wg sync.WaitGroup
	for range 200 {
		wg.Go(func() {
			w, _, err := g.Join(id1, "", run)
			if err != nil {
				t.Error(err)
				return
			}
			defer w.Leave(nil)
			n := 0
			for {
				_, r, ok, err := w.Next(t.Context())
				if err != nil {
					t.Error(err)
				}
				if !ok {
					if r != 1 || n != 4 {
						t.Errorf("result %d after %d events", r, n)
					}
					return
				}
				n++
			}
		})
	}
	wg.Wait()
}

func TestFlightKnowsWhoWaits(t *testing.T) {
	var done []int
	g := NewFlights[string, string, int](t.Context(), func(r int) { done = append(done, r) })
	defer g.Close()
	if w, started, err := g.Join(id1, "nobody", nil); w != nil || started || err != nil {
		t.Errorf("joined what is not there: %v, %v, %v", w, started, err)
	}
	flights, land := make(chan *flight, 1), make(chan struct{})
	w1, _, err := g.Join(id1, "one", func(f *flight) int { flights <- f; <-land; return 5 })
	if err != nil {
		t.Fatal(err)
	}
	f := <-flights
	_, changed := f.Members()
	w2, _, err := g.Join(id1, "two", nil)
	if err != nil {
		t.Fatal(err)
	}
	<-changed
	members, changed := f.Members()
	if diff := cmp.Diff([]string{"one", "two"}, members); diff != "" {
		t.Error(diff)
	}
	if !w1.Leave(nil) || w1.Leave(nil) {
		t.Error("the flight goes on when the first one leaves, who leaves once")
	}
	<-changed
	if diff := cmp.Diff([]string{"two"}, w2.Members()); diff != "" {
		t.Error(diff)
	}
	close(land)
	if _, r := all(t, w2); r != 5 || done != nil {
		t.Errorf("result %d; told of the end %v while somebody is there", r, done)
	}
	if w2.Leave(nil) {
		t.Error("a flight that landed goes on")
	}
	if diff := cmp.Diff([]int{5}, done); diff != "" {
		t.Error(diff)
	}
}
