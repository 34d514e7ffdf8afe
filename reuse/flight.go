package reuse

import (
	"context"
	"errors"
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
// request starts a flight, the others wait for it. E is what a flight tells
// those who wait, from its beginning to each of them; R is how it ends.
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
type Flights[E, R any] struct {
	ctx    context.Context // of all flights; values from NewFlights' caller
	cancel context.CancelCauseFunc
	wg     sync.WaitGroup // one for each flight's goroutine

	mu      sync.Mutex // guards the fields below, and those of every Flight
	closed  bool
	flights map[FlightID]*Flight[E, R] // those that can be joined
}

// NewFlights returns an empty group. When ctx ends all flights are cancelled.
func NewFlights[E, R any](ctx context.Context) *Flights[E, R] {
	g := &Flights[E, R]{flights: make(map[FlightID]*Flight[E, R])}
	g.ctx, g.cancel = context.WithCancelCause(ctx)
	return g
}

// A Flight is one build under way, seen by the function that runs it.
type Flight[E, R any] struct {
	group  *Flights[E, R]
	id     FlightID
	ctx    context.Context
	cancel context.CancelCauseFunc

	// Guarded by group.mu:
	waiters int
	events  []E
	landed  bool
	result  R
	changed chan struct{} // closed when events grow or the flight lands; nil if nobody waits
}

// Join waits for the flight with that id, and starts it if there is none: run
// is called in a goroutine of its own and returns the flight's result. Every
// Waiter must be ended with Leave. Started tells whether this call started it.
// After Close it returns ErrClosed.
func (g *Flights[E, R]) Join(id FlightID, run func(*Flight[E, R]) R) (w *Waiter[E, R], started bool, err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed {
		return nil, false, ErrClosed
	}
	f := g.flights[id]
	if f == nil {
		started = true
		f = &Flight[E, R]{group: g, id: id}
		f.ctx, f.cancel = context.WithCancelCause(g.ctx)
		g.flights[id] = f
		g.wg.Go(func() { f.land(run(f)) })
	}
	f.waiters++
	return &Waiter[E, R]{flight: f}, started, nil
}

// Start starts a flight that nobody else can join.
func (g *Flights[E, R]) Start(run func(*Flight[E, R]) R) (*Waiter[E, R], error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed {
		return nil, ErrClosed
	}
	f := &Flight[E, R]{group: g, waiters: 1}
	f.ctx, f.cancel = context.WithCancelCause(g.ctx)
	g.wg.Go(func() { f.land(run(f)) })
	return &Waiter[E, R]{flight: f}, nil
}

// Drain refuses new flights and waits until those under way have landed, or
// until ctx ends.
func (g *Flights[E, R]) Drain(ctx context.Context) error {
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
func (g *Flights[E, R]) Close() {
	g.mu.Lock()
	g.closed = true
	g.mu.Unlock()
	g.cancel(ErrClosed)
	g.wg.Wait()
}

// Context is cancelled when the flight's result is no longer wanted; its cause
// is that of the last Leave, or ErrClosed, or that of the group's context.
func (f *Flight[E, R]) Context() context.Context { return f.ctx }

// Tell adds an event, which everybody who waits or joins later receives.
func (f *Flight[E, R]) Tell(e E) {
	f.group.mu.Lock()
	defer f.group.mu.Unlock()
	f.events = append(f.events, e)
	f.wakeLocked()
}

// Waiters returns how many wait now.
func (f *Flight[E, R]) Waiters() int {
	f.group.mu.Lock()
	defer f.group.mu.Unlock()
	return f.waiters
}

func (f *Flight[E, R]) land(r R) {
	f.group.mu.Lock()
	f.landed, f.result = true, r
	f.leaveMapLocked()
	f.wakeLocked()
	f.group.mu.Unlock()
	f.cancel(nil)
}

func (f *Flight[E, R]) leaveMapLocked() {
	if f.group.flights[f.id] == f {
		delete(f.group.flights, f.id)
	}
}

func (f *Flight[E, R]) wakeLocked() {
	if f.changed != nil {
		close(f.changed)
		f.changed = nil
	}
}

// A Waiter is one request's place in a flight. It is used by one goroutine.
type Waiter[E, R any] struct {
	flight *Flight[E, R]
	seen   int
	left   bool
}

// Next returns the next event, beginning with the flight's first. At the end,
// when all events were returned, ok is false and r is the result. It waits for
// whichever comes, until ctx ends; its error is ctx's cause then.
func (w *Waiter[E, R]) Next(ctx context.Context) (e E, r R, ok bool, err error) {
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
// if it is nil. Calling Leave again does nothing.
func (w *Waiter[E, R]) Leave(why error) {
	f := w.flight
	f.group.mu.Lock()
	defer f.group.mu.Unlock()
	if w.left {
		return
	}
	w.left = true
	f.waiters--
	if f.waiters == 0 && !f.landed {
		f.leaveMapLocked()
		if why == nil {
			why = ErrAbandoned
		}
		f.cancel(why)
	}
}
