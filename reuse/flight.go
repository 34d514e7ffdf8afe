package reuse

import (
	"context"
	"errors"
	"slices"
	"sync"
)

// Why a flight's context was cancelled (context.Cause).
var (
	// ErrAbandoned: the last one who waited has left.
	ErrAbandoned = errors.New("nobody waits for the build any more")
	// ErrClosed: the group was closed.
	ErrClosed = errors.New("the server is shutting down")
)

// A FlightID says which requests share a flight.
type FlightID struct {
	// Scope separates those who do not share running builds.
	Scope uint64
	Key   Key
}

// Flights joins requests for the same build while it is under way: the first
// request starts a flight, the others wait for it. M is what a flight knows of
// one who waits, E what it tells them, from its beginning to each, and R how it
// ends.
//
//	           Join                    land
//	(nothing) ──────▶ under way ─────────────────▶ landed
//	                      │ last Leave, Close         ▲
//	                      └─▶ cancelled ──────────────┘
//
// Only a flight under way can be joined. One that was cancelled may need some
// time to end; a request that comes meanwhile starts a new one.
//
// Methods are safe for concurrent use. A Flights is made by NewFlights.
type Flights[M, E, R any] struct {
	ctx    context.Context // of all flights; values from NewFlights' caller
	cancel context.CancelCauseFunc
	done   func(R)
	wg     sync.WaitGroup // one for each flight's goroutine

	mu      sync.Mutex // guards the fields below, and those of every Flight
	closed  bool
	flights map[FlightID]*Flight[M, E, R] // those that can be joined
}

// NewFlights returns an empty group. When ctx ends all flights are cancelled.
// Done, if not nil, is called with the result of each flight once it has landed
// and everybody who waited has left.
func NewFlights[M, E, R any](ctx context.Context, done func(R)) *Flights[M, E, R] {
	g := &Flights[M, E, R]{done: done, flights: make(map[FlightID]*Flight[M, E, R])}
	g.ctx, g.cancel = context.WithCancelCause(ctx)
	return g
}

// A Flight is one build under way, seen by the function that runs it.
type Flight[M, E, R any] struct {
	group  *Flights[M, E, R]
	id     FlightID
	ctx    context.Context
	cancel context.CancelCauseFunc
	ended  chan struct{} // closed when it has landed

	// Guarded by group.mu:
	waiters []*Waiter[M, E, R] // in the order in which they came
	events  []E
	landed  bool
	result  R
	changed chan struct{} // closed when events grow or the flight lands; nil if nobody waits
	others  chan struct{} // closed when waiters change; nil if nobody asked
}

// Join waits for the flight with that id, and starts it if there is none: run
// is called in a goroutine of its own and returns the flight's result. With a
// nil run it starts nothing, and w is nil if there is no such flight. Every
// Waiter must be ended with Leave. Started tells whether this call started the
// flight. After Close it returns ErrClosed.
func (g *Flights[M, E, R]) Join(id FlightID, m M, run func(*Flight[M, E, R]) R) (w *Waiter[M, E, R], started bool, err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed {
		return nil, false, ErrClosed
	}
	f := g.flights[id]
	switch {
	case f != nil:
		return f.joinLocked(m), false, nil
	case run == nil:
		return nil, false, nil
	}
	f = &Flight[M, E, R]{group: g, id: id}
	g.flights[id] = f
	return f.startLocked(m, run), true, nil
}

// Start starts a flight that nobody else can join.
func (g *Flights[M, E, R]) Start(m M, run func(*Flight[M, E, R]) R) (*Waiter[M, E, R], error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed {
		return nil, ErrClosed
	}
	f := &Flight[M, E, R]{group: g}
	return f.startLocked(m, run), nil
}

// startLocked starts the goroutine of a new flight, with its first waiter.
func (f *Flight[M, E, R]) startLocked(m M, run func(*Flight[M, E, R]) R) *Waiter[M, E, R] {
	f.ctx, f.cancel = context.WithCancelCause(f.group.ctx)
	f.ended = make(chan struct{})
	w := f.joinLocked(m)
	f.group.wg.Go(func() { f.land(run(f)) })
	return w
}

func (f *Flight[M, E, R]) joinLocked(m M) *Waiter[M, E, R] {
	w := &Waiter[M, E, R]{flight: f, member: m}
	f.waiters = append(f.waiters, w)
	f.othersLocked()
	return w
}

// othersLocked tells that the waiters changed.
func (f *Flight[M, E, R]) othersLocked() {
	if f.others != nil {
		close(f.others)
		f.others = nil
	}
}

// Drain refuses new flights and waits until those under way have landed, or
// until ctx ends.
func (g *Flights[M, E, R]) Drain(ctx context.Context) error {
	g.mu.Lock()
	g.closed = true
	g.mu.Unlock()
	done := make(chan struct{})
	go func() { g.wg.Wait(); close(done) }() // ends with the flights, at Close at the latest
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// Close refuses new flights, cancels those under way and waits for their end.
func (g *Flights[M, E, R]) Close() {
	g.mu.Lock()
	g.closed = true
	g.mu.Unlock()
	g.cancel(ErrClosed)
	g.wg.Wait()
}

// Context is cancelled when the flight's result is no longer wanted; its cause
// is that of the last Leave, or ErrClosed, or that of the group's context.
func (f *Flight[M, E, R]) Context() context.Context { return f.ctx }

// Tell adds an event, which everybody who waits or joins later receives.
func (f *Flight[M, E, R]) Tell(e E) {
	f.group.mu.Lock()
	defer f.group.mu.Unlock()
	f.events = append(f.events, e)
	f.wakeLocked()
}

// Members returns those who wait now, in the order in which they came, and a
// channel that is closed when that changes.
func (f *Flight[M, E, R]) Members() (members []M, changed <-chan struct{}) {
	f.group.mu.Lock()
	defer f.group.mu.Unlock()
	for _, w := range f.waiters {
		members = append(members, w.member)
	}
	if f.others == nil {
		f.others = make(chan struct{})
	}
	return members, f.others
}

func (f *Flight[M, E, R]) land(r R) {
	f.group.mu.Lock()
	f.landed, f.result = true, r
	f.leaveMapLocked()
	f.wakeLocked()
	left := len(f.waiters) == 0
	f.group.mu.Unlock()
	f.cancel(nil)
	close(f.ended)
	if left && f.group.done != nil {
		f.group.done(r)
	}
}

func (f *Flight[M, E, R]) leaveMapLocked() {
	if f.group.flights[f.id] == f {
		delete(f.group.flights, f.id)
	}
}

func (f *Flight[M, E, R]) wakeLocked() {
	if f.changed != nil {
		close(f.changed)
		f.changed = nil
	}
}

// A Waiter is one request's place in a flight. It is used by one goroutine.
type Waiter[M, E, R any] struct {
	flight *Flight[M, E, R]
	member M
	seen   int
}

// Members returns those who wait now for the same flight.
func (w *Waiter[M, E, R]) Members() []M {
	members, _ := w.flight.Members()
	return members
}

// Landed is closed when the flight has ended, whoever waits then.
func (w *Waiter[M, E, R]) Landed() <-chan struct{} { return w.flight.ended }

// Next returns the next event, beginning with the flight's first. At the end,
// when all events were returned, ok is false and r is the result. It waits for
// whichever comes, until ctx ends; its error is ctx's cause then.
func (w *Waiter[M, E, R]) Next(ctx context.Context) (e E, r R, ok bool, err error) {
	f := w.flight
	for {
		f.group.mu.Lock()
		if w.seen < len(f.events) {
			e = f.events[w.seen]
			w.seen++
			f.group.mu.Unlock()
			return e, r, true, nil
		}
		if f.landed {
			r = f.result
			f.group.mu.Unlock()
			return e, r, false, nil
		}
		if f.changed == nil {
			f.changed = make(chan struct{})
		}
		changed := f.changed
		f.group.mu.Unlock()

		select {
		case <-changed:
		case <-ctx.Done():
			return e, r, false, context.Cause(ctx)
		}
	}
}

// Leave ends the waiting. If nobody else waits and the flight has not landed,
// it is cancelled and can no longer be joined; why is the cause, ErrAbandoned
// if it is nil. GoesOn tells whether the flight is under way without this
// waiter. Calling Leave again does nothing.
func (w *Waiter[M, E, R]) Leave(why error) (goesOn bool) {
	f := w.flight
	f.group.mu.Lock()
	i := slices.Index(f.waiters, w)
	if i < 0 {
		f.group.mu.Unlock()
		return false
	}
	f.waiters = slices.Delete(f.waiters, i, i+1)
	f.othersLocked()
	last, landed := len(f.waiters) == 0, f.landed
	if last && !landed {
		f.leaveMapLocked()
		if why == nil {
			why = ErrAbandoned
		}
		f.cancel(why)
	}
	f.group.mu.Unlock()
	if last && landed && f.group.done != nil {
		f.group.done(f.result)
	}
	return !last && !landed
}
