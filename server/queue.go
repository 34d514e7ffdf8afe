package server

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"sync"

	"nbd/store"
)

// maxPassed is how often a build that does not fit yet lets a smaller one of
// another account start before it. After that room is kept for it, so that
// large builds do not starve.
const maxPassed = 16

// Room is an amount of what guests take, or all that there is of it.
type Room struct {
	Guests    int
	MemoryMiB int // of the host's memory
	CPUs      int
}

// lacks returns what of the need n is not within r, "" if it fits.
func (r Room) lacks(n Room) string {
	switch {
	case n.Guests > r.Guests:
		return "guests"
	case n.MemoryMiB > r.MemoryMiB:
		return "memory"
	case n.CPUs > r.CPUs:
		return "CPUs"
	}
	return ""
}

func (r *Room) add(n Room) {
	r.Guests += n.Guests
	r.MemoryMiB += n.MemoryMiB
	r.CPUs += n.CPUs
}

func (r *Room) sub(n Room) { r.add(Room{-n.Guests, -n.MemoryMiB, -n.CPUs}) }

// A queue says who runs next. Of the accounts that wait, the one with the
// fewest running builds is first, and of equal ones the one that waited longest
// since it was served; within an account it is first come, first served.
// Methods are safe for concurrent use.
type queue struct {
	total Room // does not change

	mu       sync.Mutex // guards all below
	free     Room
	accounts map[store.AccountID]*queueAccount // those that wait or run
	turn     uint64                            // counts starts and accounts that came
}

// A queueAccount is one account's part of a queue; guarded by queue.mu.
type queueAccount struct {
	waiting []*ticket
	running int
	came    uint64 // the queue's turn when it came
	served  uint64 // the queue's turn when a build of it last started; 0 before
}

// A ticket is one build that waits.
type ticket struct {
	need    Room
	granted chan struct{} // closed when it may run
	place   chan queuePlace

	// Guarded by queue.mu:
	passed  int
	told    queuePlace
	hasTold bool
}

// A queuePlace is where a build stands in the queue.
type queuePlace struct {
	ahead int    // builds that start before it
	lacks string // what there is not enough of: "guests", "memory" or "CPUs"
}

func (p queuePlace) String() string {
	switch p.ahead {
	case 0:
		return "waiting for free " + p.lacks + ": next in the queue"
	case 1:
		return "waiting for free " + p.lacks + ": 1 build is ahead"
	}
	return fmt.Sprintf("waiting for free %s: %d builds are ahead", p.lacks, p.ahead)
}

func newQueue(total Room) *queue {
	return &queue{total: total, free: total, accounts: make(map[store.AccountID]*queueAccount)}
}

// errTooLarge says that a build needs more than the whole machine has.
type errTooLarge struct {
	lacks       string
	need, total Room
}

func (e *errTooLarge) Error() string {
	return fmt.Sprintf("the build needs more %s than this server gives to builds (needs %d MiB and %d CPUs, there are %d MiB and %d CPUs)",
		e.lacks, e.need.MemoryMiB, e.need.CPUs, e.total.MemoryMiB, e.total.CPUs)
}

// acquire waits until there is room for a build and takes it; release gives it
// back and must be called once. It calls waits, in its own goroutine, with its
// place in the queue when it has to wait, and again when the place has become
// half of the last one told. Its error is ctx's cause or *errTooLarge.
func (q *queue) acquire(ctx context.Context, a store.AccountID, need Room, waits func(queuePlace)) (release func(), err error) {
	need.Guests = 1
	if lacks := q.total.lacks(need); lacks != "" {
		return nil, &errTooLarge{lacks, need, q.total}
	}
	t := &ticket{need: need, granted: make(chan struct{}), place: make(chan queuePlace, 1)}
	q.mu.Lock()
	acct := q.accounts[a]
	if acct == nil {
		q.turn++
		acct = &queueAccount{came: q.turn}
		q.accounts[a] = acct
	}
	acct.waiting = append(acct.waiting, t)
	q.dispatchLocked()
	q.mu.Unlock()

	for {
		select {
		case <-t.granted:
			return sync.OnceFunc(func() { q.release(a, need) }), nil
		default:
		}
		select {
		case <-t.granted:
		case p := <-t.place:
			waits(p)
		case <-ctx.Done():
			q.leave(a, t)
			return nil, context.Cause(ctx)
		}
	}
}

// leave withdraws a ticket, which may have been granted meanwhile.
func (q *queue) leave(a store.AccountID, t *ticket) {
	q.mu.Lock()
	defer q.mu.Unlock()
	acct := q.accounts[a]
	if i := slices.Index(acct.waiting, t); i >= 0 {
		acct.waiting = slices.Delete(acct.waiting, i, i+1)
	} else {
		q.free.add(t.need)
		acct.running--
	}
	q.forgetLocked(a)
	q.dispatchLocked()
}

func (q *queue) release(a store.AccountID, need Room) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.free.add(need)
	q.accounts[a].running--
	q.forgetLocked(a)
	q.dispatchLocked()
}

// forgetLocked drops an account that neither waits nor runs.
func (q *queue) forgetLocked(a store.AccountID) {
	if acct := q.accounts[a]; acct.running == 0 && len(acct.waiting) == 0 {
		delete(q.accounts, a)
	}
}

// dispatchLocked starts whatever fits, and tells the others their place.
func (q *queue) dispatchLocked() {
	for {
		order := q.orderLocked()
		next := q.nextLocked(order)
		if next == nil {
			q.tellLocked(order)
			return
		}
		t := next.waiting[0]
		next.waiting = slices.Delete(next.waiting, 0, 1)
		next.running++
		q.turn++
		next.served = q.turn
		q.free.sub(t.need)
		close(t.granted)
	}
}

// orderLocked returns the accounts that wait, the one to serve next first.
func (q *queue) orderLocked() []*queueAccount {
	var order []*queueAccount
	for _, a := range q.accounts {
		if len(a.waiting) > 0 {
			order = append(order, a)
		}
	}
	slices.SortFunc(order, func(a, b *queueAccount) int {
		return cmp.Or(cmp.Compare(a.running, b.running), cmp.Compare(a.served, b.served), cmp.Compare(a.came, b.came))
	})
	return order
}

// nextLocked returns the first account whose first build fits. Builds that do
// not fit are passed by it, each a few times only.
func (q *queue) nextLocked(order []*queueAccount) *queueAccount {
	for i, a := range order {
		if q.free.lacks(a.waiting[0].need) == "" {
			for _, passed := range order[:i] {
				passed.waiting[0].passed++
			}
			return a
		}
		if a.waiting[0].passed >= maxPassed {
			return nil
		}
	}
	return nil
}

// tellLocked tells those who wait their place, when it is new or has halved.
func (q *queue) tellLocked(order []*queueAccount) {
	for i, a := range order {
		for n, t := range a.waiting {
			// Accounts take turns: before the n-th of this one go n+1 of those
			// that are before it in the order, and n of the others.
			ahead := n
			for j, other := range order {
				if j < i {
					ahead += min(len(other.waiting), n+1)
				} else if j > i {
					ahead += min(len(other.waiting), n)
				}
			}
			if t.hasTold && ahead > t.told.ahead/2 {
				continue
			}
			lacks := q.free.lacks(t.need)
			if lacks == "" {
				lacks = "guests" // it waits for one that is before it
			}
			p := queuePlace{ahead, lacks}
			if t.hasTold && t.told == p {
				continue
			}
			t.told, t.hasTold = p, true
			select {
			case <-t.place: // it was not read: overtaken
			default:
			}
			t.place <- p
		}
	}
}

// A QueueStatus tells what runs and what waits now.
type QueueStatus struct {
	Running int  `json:"running"`
	Waiting int  `json:"waiting"`
	Total   Room `json:"total"`
	Free    Room `json:"free"`
}

func (q *queue) status() QueueStatus {
	q.mu.Lock()
	defer q.mu.Unlock()
	s := QueueStatus{Total: q.total, Free: q.free}
	for _, a := range q.accounts {
		s.Running += a.running
		s.Waiting += len(a.waiting)
	}
	return s
}
