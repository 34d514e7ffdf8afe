package server

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

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
// since it was served; within an account it is first come, first served. A build
// for which several accounts wait has its place with each of them and starts in
// the best, with the most resources that one of them wants and that are free.
// What is free is counted by what guests may take, and is what the machine really
// has (machine.go) if that is less. Methods are safe for concurrent use.
type queue struct {
	total   Room     // does not change
	machine *Machine // nil if only total counts

	mu       sync.Mutex // guards all below
	free     Room
	running  int
	writes   int                               // MiB that running builds are expected to write
	short    string                            // what the machine had too little of at the last look; "" if nothing
	again    *time.Timer                       // of the next look; nil if nobody waits for it
	accounts map[store.AccountID]*queueAccount // those that wait or run
	turn     uint64                            // counts starts and accounts that came
	closing  chan struct{}                     // closed by close
}

// A queueAccount is one account's part of a queue; guarded by queue.mu.
type queueAccount struct {
	id      store.AccountID
	waiting []*ticket
	running int
	came    uint64 // the queue's turn when it came
	served  uint64 // the queue's turn when a build of it last started; 0 before
}

// A want is what the guest of a build would take for one request that waits.
type want struct {
	account store.AccountID
	build   store.BuildID // the request's
	need    Room
	// leastCPUs is what it begins with if that is free and need.CPUs are not; 0 is
	// need.CPUs.
	leastCPUs          int
	memoryMiB, diskMiB int // of the guest
	// writesMiB is how much it is expected to write to the host's disk.
	writesMiB int
}

// within returns the want with as many CPUs as are free, down to leastCPUs, and
// what it lacks.
func (w want) within(free Room) (want, string) {
	if w.leastCPUs > 0 && w.need.CPUs > free.CPUs {
		w.need.CPUs = max(free.CPUs, w.leastCPUs)
	}
	return w, free.lacks(w.need)
}

// A ticket is one build that waits.
type ticket struct {
	since   time.Time
	granted chan struct{} // closed when it may run
	place   chan queuePlace

	// Guarded by queue.mu:
	wants   []want // those that can ever fit, the largest first; of an account each build once
	got     want   // set with granted
	passed  int
	told    queuePlace
	hasTold bool
}

// fits returns the largest want that fits into free room.
func (t *ticket) fits(free Room) (want, bool) {
	for _, w := range t.wants {
		if w, lacks := w.within(free); lacks == "" {
			return w, true
		}
	}
	return want{}, false
}

// waitsFor reports whether an account waits for the build.
func (t *ticket) waitsFor(a store.AccountID) bool {
	return slices.ContainsFunc(t.wants, func(w want) bool { return w.account == a })
}

// A queuePlace is where a build stands in the queue.
type queuePlace struct {
	ahead int    // builds that start before it
	lacks string // what there is not enough of: see QueuedBuild.Lacks
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

func newQueue(total Room, m *Machine) *queue {
	return &queue{total: total, machine: m, free: total, accounts: make(map[store.AccountID]*queueAccount), closing: make(chan struct{})}
}

// close ends the waiting of all builds, and of those that come.
func (q *queue) close() {
	q.mu.Lock()
	defer q.mu.Unlock()
	select {
	case <-q.closing:
	default:
		close(q.closing)
	}
	if q.again != nil {
		q.again.Stop()
	}
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
// back and must be called once. Wants says who waits for the build, and returns
// a channel that is closed when that changes. Acquire calls waits, in its own
// goroutine, with its place in the queue when it has to wait, and again when the
// place has become half of the last one told. Its error is ctx's cause,
// *errTooLarge, or errEnding after close.
func (q *queue) acquire(ctx context.Context, wants func() ([]want, <-chan struct{}), waits func(queuePlace)) (got want, release func(), err error) {
	t := &ticket{since: time.Now(), granted: make(chan struct{}), place: make(chan queuePlace, 1)}
	for {
		list, changed := wants()
		if err := q.update(t, list); err != nil {
			q.leave(t)
			return want{}, nil, err
		}
	same:
		for {
			select {
			case <-t.granted:
				got := t.got
				return got, sync.OnceFunc(func() { q.release(got) }), nil
			default:
			}
			select {
			case <-t.granted:
			case p := <-t.place:
				waits(p)
			case <-changed:
				break same
			case <-q.closing:
				if q.leave(t) {
					return want{}, nil, errEnding
				}
			case <-ctx.Done():
				q.leave(t)
				if got := t.got; got.account != 0 {
					q.release(got)
				}
				return want{}, nil, context.Cause(ctx)
			}
		}
	}
}

// update says who waits for the build of a ticket now.
func (q *queue) update(t *ticket, list []want) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	select {
	case <-t.granted:
		return nil
	case <-q.closing:
		return errEnding
	default:
	}
	var never *errTooLarge
	before := t.wants
	t.wants = nil
	for _, w := range list {
		if _, lacks := w.within(q.total); lacks != "" {
			never = &errTooLarge{lacks, w.need, q.total}
			continue
		}
		t.wants = append(t.wants, w)
	}
	if len(t.wants) == 0 && never != nil {
		t.wants = before // for leave
		return never
	}
	slices.SortStableFunc(t.wants, func(a, b want) int {
		return cmp.Or(cmp.Compare(b.need.MemoryMiB, a.need.MemoryMiB), cmp.Compare(b.need.CPUs, a.need.CPUs))
	})
	for _, w := range before {
		if !t.waitsFor(w.account) {
			q.withdrawLocked(t, w.account)
		}
	}
	for _, w := range t.wants {
		acct := q.accounts[w.account]
		if acct == nil {
			q.turn++
			acct = &queueAccount{id: w.account, came: q.turn}
			q.accounts[w.account] = acct
		}
		if !slices.Contains(acct.waiting, t) {
			acct.waiting = append(acct.waiting, t)
		}
	}
	q.dispatchLocked()
	return nil
}

// withdrawLocked takes a ticket out of what an account waits for.
func (q *queue) withdrawLocked(t *ticket, a store.AccountID) {
	acct := q.accounts[a]
	if acct == nil {
		return
	}
	if i := slices.Index(acct.waiting, t); i >= 0 {
		acct.waiting = slices.Delete(acct.waiting, i, i+1)
	}
	q.forgetLocked(a)
}

// leave withdraws a ticket; false if it was granted meanwhile.
func (q *queue) leave(t *ticket) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if t.got.account != 0 {
		return false
	}
	for _, w := range t.wants {
		q.withdrawLocked(t, w.account)
	}
	t.wants = nil
	q.dispatchLocked()
	return true
}

func (q *queue) release(got want) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.free.add(got.need)
	q.writes -= got.writesMiB
	q.running--
	q.accounts[got.account].running--
	q.forgetLocked(got.account)
	q.dispatchLocked()
}

// forgetLocked drops an account that neither waits nor runs.
func (q *queue) forgetLocked(a store.AccountID) {
	if acct := q.accounts[a]; acct != nil && acct.running == 0 && len(acct.waiting) == 0 {
		delete(q.accounts, a)
	}
}

// dispatchLocked starts whatever fits, and tells the others their place.
func (q *queue) dispatchLocked() {
	select {
	case <-q.closing:
		return
	default:
	}
	look := q.machine.look() // once, for all that start now
	for {
		order := q.orderLocked()
		next, got := q.nextLocked(order, look)
		if next == nil {
			q.lookAgainLocked()
			q.tellLocked(order)
			return
		}
		t := next.waiting[0]
		got.account = next.id // whose turn it was, whoever wants as much
		t.got = got
		next.running++
		q.turn++
		next.served = q.turn
		q.free.sub(got.need)
		q.writes += got.writesMiB
		q.running++
		for _, w := range t.wants {
			q.withdrawLocked(t, w.account)
		}
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

// nextLocked returns the first account whose first build fits, and what that is
// given. Builds that do not fit are passed by it, each a few times only.
func (q *queue) nextLocked(order []*queueAccount, look func() (machineRoom, bool)) (*queueAccount, want) {
	q.short = ""
	for i, a := range order {
		got, ok := a.waiting[0].fits(q.free)
		if ok {
			lacks := q.machineLacksLocked(got, look)
			if lacks == "" {
				for _, passed := range order[:i] {
					passed.waiting[0].passed++
				}
				return a, got
			}
			q.short = lacks
		}
		if a.waiting[0].passed >= maxPassed {
			return nil, want{}
		}
	}
	return nil, want{}
}

// machineLacksLocked returns what the machine has too little of now for one more
// guest, given that those which run may still take what they were promised. One
// guest may always run: it is bounded, and waiting might never end.
func (q *queue) machineLacksLocked(w want, look func() (machineRoom, bool)) string {
	if q.machine == nil || q.running == 0 {
		return ""
	}
	have, ok := look()
	if !ok {
		return ""
	}
	promised := q.total.MemoryMiB - q.free.MemoryMiB
	switch {
	case have.pressed || have.memoryMiB-max(0, promised-have.guestsMemoryMiB) < w.need.MemoryMiB+keptMemoryMiB:
		return "memory of the machine"
	case have.diskMiB-max(0, q.writes-have.guestsDiskMiB) < w.writesMiB:
		return "disk of the machine"
	}
	return ""
}

// lookAgainLocked has the queue look at the machine again soon, if somebody waits
// for that: nothing tells when other programs give back what they took.
func (q *queue) lookAgainLocked() {
	if q.short == "" || q.again != nil {
		return
	}
	q.again = time.AfterFunc(betweenLooks, func() {
		q.mu.Lock()
		defer q.mu.Unlock()
		q.again = nil
		q.dispatchLocked()
	})
}

// placesLocked returns the place of each build that waits: the best of those
// that it has with its accounts.
func (q *queue) placesLocked(order []*queueAccount) map[*ticket]queuePlace {
	places := make(map[*ticket]queuePlace)
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
			if p, ok := places[t]; ok && p.ahead <= ahead {
				continue
			}
			lacks := cmp.Or(q.short, "guests") // it waits for one that is before it
			if len(t.wants) > 0 {
				if _, l := t.wants[len(t.wants)-1].within(q.free); l != "" {
					lacks = l
				}
			}
			places[t] = queuePlace{ahead, lacks}
		}
	}
	return places
}

// tellLocked tells those who wait their place, when it is new or has halved.
func (q *queue) tellLocked(order []*queueAccount) {
	for t, p := range q.placesLocked(order) {
		if t.hasTold && (p.ahead > t.told.ahead/2 || p == t.told) {
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

// A QueuedBuild is a request whose build waits in the queue.
type QueuedBuild struct {
	Build   store.BuildID
	Account store.AccountID
	Since   time.Time
	// Ahead is how many builds start before it; Lacks what there is not enough
	// of: "guests", "memory" or "CPUs" of what builds may take, or "memory of the
	// machine" or "disk of the machine", which something else has taken.
	Ahead int
	Lacks string
}

// waiting returns the requests whose builds wait, those that start first first.
func (q *queue) waiting() []QueuedBuild {
	q.mu.Lock()
	defer q.mu.Unlock()
	var list []QueuedBuild
	for t, p := range q.placesLocked(q.orderLocked()) {
		for _, w := range t.wants {
			list = append(list, QueuedBuild{w.build, w.account, t.since, p.ahead, p.lacks})
		}
	}
	slices.SortFunc(list, func(a, b QueuedBuild) int {
		return cmp.Or(cmp.Compare(a.Ahead, b.Ahead), cmp.Compare(a.Build, b.Build))
	})
	return list
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
	s := QueueStatus{Running: q.running, Total: q.total, Free: q.free}
	waiting := make(map[*ticket]bool)
	for _, a := range q.accounts {
		for _, t := range a.waiting {
			waiting[t] = true
		}
	}
	s.Waiting = len(waiting)
	return s
}
