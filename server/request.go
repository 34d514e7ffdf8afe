package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	"nbd/nixproto"
	"nbd/reuse"
	"nbd/store"
)

// A request is one request for a build, from its arrival to its answer. It has
// an id and a record of its own, whether or not a run is made for it.
//
// A run has one record, too: that of the request that owns it. The first
// request of a flight owns it; if that one leaves while others wait, the one
// that has waited longest does, and its record becomes that of a run. So each
// account finds one run for which it was the cause, and no trace of others.
type request struct {
	b       *Builds
	session *Session
	job     *job
	logs    logList // of the attempts that it was shown
	// cancel ends the waiting; its cause says how.
	cancel context.CancelCauseFunc
	done   chan struct{} // closed when it has ended, with its record

	mu        sync.Mutex // guards what follows
	record    *store.Build
	decisions []store.Decision
	plan      plan     // of the guest, before it joins or starts a run
	owns      *attempt // whose record is this request's; nil if there is none
	ran       bool     // it owned an attempt
	left      bool     // it waits no more
	written   bool     // its record was stored since it began to wait
}

// newRequest gives a request its id and makes it known.
func (b *Builds) newRequest(ctx context.Context, s *Session, j *job, cancel context.CancelCauseFunc) (*request, error) {
	id, err := b.store.ReserveBuild(ctx)
	if err != nil {
		return nil, err
	}
	r := &request{b: b, session: s, job: j, cancel: cancel, done: make(chan struct{}), record: &store.Build{
		ID:      id,
		Account: j.account,
		DrvPath: j.drvPath,
		Name:    j.drv.Name,
		System:  j.drv.System,
		Status:  string(reuse.Pending),
		Created: time.Now(),
		Tags:    j.set.tags,
	}}
	if j.restart != nil {
		r.record.RestartOf = j.restart.ID
	}
	b.live.add(r, id)
	return r, nil
}

// decide notes a check on the way to the answer.
func (r *request) decide(check string, taken bool, reason string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.decisions = append(r.decisions, store.Decision{Check: check, Taken: taken, Reason: reason})
}

// begin forgets the checks so far: they are made anew.
func (r *request) begin() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.decisions = nil
}

// id returns the id of the request's current record.
func (r *request) id() store.BuildID {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.record.ID
}

// keyed notes the reuse key.
func (r *request) keyed(key reuse.Key) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.record.Key = key.String()
}

// owned returns the attempt that the request owns, nil if there is none.
func (r *request) owned() *attempt {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.owns
}

// joined stores that the request waits for the run of another one.
func (r *request) joined(ctx context.Context) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.owns != nil || r.ran || r.written {
		return nil
	}
	r.written = true
	b := *r.record
	b.Reused, b.Decisions = true, r.decisions
	return r.b.store.WriteBuild(ctx, &b)
}

// follows notes whose log the request is shown.
func (r *request) follows(ctx context.Context, a *attempt) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.owns != nil || r.ran {
		return nil
	}
	r.record.LogOf = a.logID
	b := *r.record
	b.Reused, b.Decisions, b.Status = true, r.decisions, string(reuse.Running)
	return r.b.store.WriteBuild(ctx, &b)
}

// finish stores the end of a request, unless its run does that.
func (r *request) finish(end *ending, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.left = true
	defer r.retireLocked()
	if r.owns != nil || r.ran && r.record.Status != string(reuse.Running) && r.record.Status != string(reuse.Pending) {
		return
	}
	b := r.record
	b.Reused = !r.ran
	b.Decisions = r.decisions
	b.Stopped = time.Now()
	var refused *refusal
	switch {
	case end != nil:
		b.Status, b.Error = string(end.status), firstLine(end.message)
		b.Outputs = end.outputs
		if b.Reused {
			b.LogOf = end.log
			if end.account == b.Account {
				b.ReusedFrom = end.build
			}
		}
	case gone(err):
		b.Status = string(reuse.ClientDisconnect)
		b.Error = abandoned(r.job)
	case errors.As(err, &refused):
		b.Status, b.Error = string(reuse.ClientError), firstLine(refused.msg)
	default:
		b.Status, b.Error = string(reuse.InternalError), "the server could not answer"
	}
	if r.ran { // somebody else's now; what it cost so far was this one's
		b.LimitSeconds = limitSeconds(reuse.Status(b.Status), b.Started, b.Stopped, r.pays(b.CPUs))
	}
	if err := r.b.store.WriteBuild(context.Background(), b); err != nil {
		r.b.cfg.Logger.Error("cannot store the record of a request", "build", b.ID, "err", err)
	}
}

// retireLocked forgets a request that has left, once its record has its end: who
// follows it comes to the end of the log, and finds that. It is called with
// r.mu held.
func (r *request) retireLocked() {
	if r.left && r.owns == nil {
		r.b.live.remove(r)
		r.logs.end()
	}
}

// firstLine is the first line of a message, for a record.
func firstLine(message string) string {
	line, _, _ := strings.Cut(message, "\n")
	return strings.TrimRight(line, ";:")
}

// liveRequests are the requests that have not been answered, and runs that go
// on, by id.
type liveRequests struct {
	mu      sync.Mutex // guards what follows
	m       map[store.BuildID]*request
	claims  map[store.AccountID]int // requests that started a flight
	claimed map[*request]bool       // those
}

// claim counts a request as one that starts a run, unless its account has most
// of those already; 0 is no bound.
func (l *liveRequests) claim(r *request, most int) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.claimed[r] {
		return true
	}
	if l.claims == nil {
		l.claims, l.claimed = make(map[store.AccountID]int), make(map[*request]bool)
	}
	if most > 0 && l.claims[r.job.account] >= most {
		return false
	}
	l.claims[r.job.account]++
	l.claimed[r] = true
	return true
}

// unclaim takes back a claim.
func (l *liveRequests) unclaim(r *request) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.unclaimLocked(r)
}

func (l *liveRequests) unclaimLocked(r *request) {
	if !l.claimed[r] {
		return
	}
	delete(l.claimed, r)
	if l.claims[r.job.account]--; l.claims[r.job.account] == 0 {
		delete(l.claims, r.job.account)
	}
}

func (l *liveRequests) add(r *request, id store.BuildID) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.m == nil {
		l.m = make(map[store.BuildID]*request)
	}
	l.m[id] = r
}

// remove forgets a request. It is called with r.mu held.
func (l *liveRequests) remove(r *request) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.m, r.record.ID)
	l.unclaimLocked(r)
}

func (l *liveRequests) drop(id store.BuildID) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.m, id)
}

func (l *liveRequests) get(id store.BuildID) *request {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.m[id]
}

// A cancelled is why the waiting of a request ended that was cancelled.
type cancelled struct{ by string }

func (e *cancelled) Error() string {
	if e.by == "" {
		return "the build was cancelled"
	}
	return "the build was cancelled by " + e.by
}

// ending is the end for whoever waited.
func (e *cancelled) ending(drv nixproto.StorePath) *ending {
	return &ending{status: reuse.Cancelled, code: nixproto.MiscFailure, drvPath: drv, hopeless: true,
		message: fmt.Sprintf("cannot build '%s': %v", drv, e)}
}

// Cancel ends a request of the account that waits or runs, and returns when it
// has ended; others that wait for the same run go on. By says who did, for the
// client; it may be empty. A build
// that is not the account's is store.ErrNotFound, one that has ended is
// store.ErrInvalid.
func (b *Builds) Cancel(ctx context.Context, a store.AccountID, id store.BuildID, by string) error {
	rec, err := b.ownRecord(ctx, a, id)
	if r := b.live.get(id); r != nil && r.job.account == a {
		r.cancel(&cancelled{by})
		select {
		case <-r.done:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	if err != nil {
		return err
	}
	return fmt.Errorf("cancel build %d: %w: it has ended, %s", id, store.ErrInvalid, rec.Status)
}

// ownRecord returns a record of an account.
func (b *Builds) ownRecord(ctx context.Context, a store.AccountID, id store.BuildID) (*store.Build, error) {
	rec, err := b.store.Build(ctx, id)
	if err == nil && rec.Account != a {
		err = fmt.Errorf("build %d: %w", id, store.ErrNotFound)
	}
	if err != nil {
		return nil, err
	}
	return rec, nil
}

// Follow returns the log of a build of the account from its beginning: what
// there is so far, and what comes until it ends, retries included. A build that
// has no log and will have none is store.ErrNotFound. When the log ends, the
// record of the build says how it ended. The caller closes it.
func (b *Builds) Follow(ctx context.Context, a store.AccountID, id store.BuildID) (io.ReadCloser, error) {
	r := b.live.get(id)
	if r == nil || r.job.account != a {
		if _, err := b.ownRecord(ctx, a, id); err != nil {
			return nil, err
		}
		return b.store.OpenBuildLog(ctx, id)
	}
	return &follower{ctx: ctx, b: b, r: r}, nil
}

// A follower reads the logs of a request's attempts, one after the other.
type follower struct {
	ctx  context.Context
	b    *Builds
	r    *request
	next int // of the attempts
	log  io.ReadCloser
}

func (f *follower) Read(p []byte) (int, error) {
	for {
		if f.log != nil {
			n, err := f.log.Read(p)
			if !errors.Is(err, io.EOF) || n > 0 {
				return n, err
			}
			err = f.log.Close()
			if f.log = nil; err != nil {
				return 0, err
			}
		}
		id, err := f.r.logs.at(f.ctx, f.next)
		if err != nil {
			return 0, err
		}
		f.next++
		if f.log, err = f.b.store.OpenBuildLog(f.ctx, id); err != nil {
			return 0, err
		}
	}
}

// Close ends the reading.
func (f *follower) Close() error {
	if f.log == nil {
		return nil
	}
	return f.log.Close()
}

// A logList lists the logs of a request's attempts as they come.
type logList struct {
	mu   sync.Mutex // guards what follows
	ids  []store.BuildID
	done bool
	more chan struct{} // closed when something changes; nil if nobody waits
}

func (l *logList) add(id store.BuildID) { l.change(func() { l.ids = append(l.ids, id) }) }
func (l *logList) end()                 { l.change(func() { l.done = true }) }

func (l *logList) change(f func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	f()
	if l.more != nil {
		close(l.more)
		l.more = nil
	}
}

// at waits for the log number i; io.EOF if there will be none.
func (l *logList) at(ctx context.Context, i int) (store.BuildID, error) {
	for {
		l.mu.Lock()
		if i < len(l.ids) {
			defer l.mu.Unlock()
			return l.ids[i], nil
		}
		if l.done {
			l.mu.Unlock()
			return 0, io.EOF
		}
		if l.more == nil {
			l.more = make(chan struct{})
		}
		more := l.more
		l.mu.Unlock()
		select {
		case <-more:
		case <-ctx.Done():
			return 0, context.Cause(ctx)
		}
	}
}
