package vm

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"sync"
	"time"
)

// templateTries is how often it is tried to make a template, one time after the
// other: emulators crash now and then. templateRetry is how long guests boot from
// cold after that, or when one did not work twice.
const (
	templateTries = 2
	templateRetry = 10 * time.Minute
)

// templates holds a template for each kind of machine that was asked for, as
// many as there is memory for. They are made in the background, one at a time.
// Who needs one that is not there yet does not wait for longer than it takes to
// read one from the disk: there is a larger one, or the guest boots from cold.
// That only so many do at once, since each needs a processor for itself: when
// many builds come with the first one, most of them wait for the template after
// all.
type templates struct {
	budget int64         // of memory, in bytes
	cold   chan struct{} // holds an element for each guest that boots for a build
	making lock          // held by who boots a guest to save it

	mu   sync.Mutex // guards what follows, and the slots
	byID map[string]*templateSlot
	wait sync.WaitGroup // for goroutines that make templates
}

// newTemplates returns an empty table; so many guests may boot for builds at once.
func newTemplates(budget int64, boots int) *templates {
	return &templates{budget: budget, making: newLock(), byID: map[string]*templateSlot{}, cold: make(chan struct{}, boots)}
}

// A templateSlot is where one template is, is being made, or was not made.
//
//	loading ──▶ booting ──▶ ready ──▶ dropped
//	   └──────────┼───────────┘
//	              └──▶ failed
type templateSlot struct {
	id      string
	machine machine
	p       *platform
	booting chan struct{} // closed when it is known that there is none on the disk
	done    chan struct{} // closed when it is ready or has failed
	// begun is when the slot was made, and remade reports that it was because
	// its predecessor did not work.
	begun  time.Time
	remade bool

	// The fields below are guarded by templates.mu.
	template *template // holds a use; nil when it is not ready
	err      error     // of a failure
	at       time.Time // of the failure, or of the last use
}

// A templateMaker says where templates come from.
type templateMaker struct {
	// load returns one that was kept, nil if there is none that is whole.
	load func(id string) *template
	// boot makes one.
	boot func() (*template, error)
	// keep is called with a use of one that boot has made, which it releases.
	keep func(id string, t *template)
}

// want sees to it that there will be a template for the machine.
func (t *templates) want(p *platform, m machine, from templateMaker) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.slotLocked(p, m, from)
}

// slotLocked returns the slot for a machine, new if there is none or if one that
// has failed is to be tried again.
func (t *templates) slotLocked(p *platform, m machine, from templateMaker) *templateSlot {
	id := p.templateID(m)
	if s := t.byID[id]; s != nil && (s.err == nil || time.Since(s.at) < templateRetry) {
		return s
	}
	return t.startLocked(&templateSlot{id: id, machine: m, p: p}, from)
}

// startLocked puts a slot into the table and starts the making of its template.
func (t *templates) startLocked(s *templateSlot, from templateMaker) *templateSlot {
	s.booting, s.done, s.begun = newDone(), newDone(), time.Now()
	t.byID[s.id] = s
	t.wait.Go(func() { t.make(s, from) })
	return s
}

// make fills a slot.
func (t *templates) make(s *templateSlot, from templateMaker) {
	made, err := from.load(s.id), error(nil)
	loaded := made != nil
	if !loaded {
		close(s.booting)
		// It ends with the Runner, and with it what others wait for here.
		if err = t.making.lock(context.Background()); err == nil {
			for range templateTries {
				if made, err = from.boot(); err == nil {
					break
				}
			}
			t.making.unlock()
		}
	}
	t.mu.Lock()
	s.template, s.err, s.at = made, err, time.Now()
	if t.byID[s.id] != s {
		t.emptyLocked(s) // nobody wants it any more
	}
	t.trimLocked(s)
	if s.template != nil && !loaded {
		defer from.keep(s.id, s.template.retain())
	}
	t.mu.Unlock()
	close(s.done)
}

// trimLocked drops what was not used for the longest time until the rest fits
// into memory. The slot given stays.
func (t *templates) trimLocked(keep *templateSlot) {
	ready := t.readyLocked(func(s *templateSlot) bool { return true })
	slices.SortFunc(ready, func(a, b *templateSlot) int { return b.at.Compare(a.at) })
	var sum int64
	for _, s := range ready {
		if sum += s.template.bytes(); sum > t.budget && s != keep {
			delete(t.byID, s.id)
			t.emptyLocked(s)
		}
	}
}

// emptyLocked gives up a slot's template, if it has one.
func (t *templates) emptyLocked(s *templateSlot) {
	if s.template != nil {
		s.template.release()
		s.template = nil
	}
}

// readyLocked returns the slots with a template that a function likes.
func (t *templates) readyLocked(like func(*templateSlot) bool) (all []*templateSlot) {
	for _, s := range t.byID {
		if s.template != nil && like(s) {
			all = append(all, s)
		}
	}
	return all
}

// A loan is a template that a clone is made of.
type loan struct {
	*template
	slot *templateSlot
}

// take returns a template to clone, which the caller releases, or nil when the
// guest is to boot from cold: then cold is not nil and must be called when it
// has booted. err is ctx's, or says why there is no template.
func (t *templates) take(ctx context.Context, p *platform, m machine, from templateMaker) (l *loan, cold func(), err error) {
	t.mu.Lock()
	s := t.slotLocked(p, m, from)
	l = t.lendLocked(s, m)
	t.mu.Unlock()
	if l != nil {
		return l, nil, nil
	}
	if cold, err = t.await(ctx, s); cold != nil || err != nil {
		return nil, cold, err
	}
	t.mu.Lock()
	l, err = t.lendLocked(s, m), s.err
	t.mu.Unlock()
	if l != nil {
		return l, nil, nil
	}
	if err == nil {
		err = errors.New("the template was dropped")
	}
	cold, cerr := t.boot(ctx)
	if cerr != nil {
		return nil, nil, cerr
	}
	return nil, cold, err
}

// await waits until a slot has its template or has failed. If that needs a boot,
// it ends earlier when it is the caller's turn to boot, and returns cold.
func (t *templates) await(ctx context.Context, s *templateSlot) (cold func(), err error) {
	select {
	case <-s.done:
		return nil, nil
	case <-s.booting:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	select {
	case <-s.done: // also when it is the caller's turn, too
		return nil, nil
	default:
	}
	select {
	case <-s.done:
		return nil, nil
	case t.cold <- struct{}{}:
		return t.warm, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// boot waits for the turn of a guest that is to boot from cold. booted must be
// called when it has.
func (t *templates) boot(ctx context.Context) (booted func(), err error) {
	select {
	case t.cold <- struct{}{}:
		return t.warm, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// warm ends a turn.
func (t *templates) warm() { <-t.cold }

// lendLocked lends the template of a slot, or else the smallest that is ready
// and serves the machine; nil if there is none.
func (t *templates) lendLocked(s *templateSlot, m machine) *loan {
	if s.template == nil {
		ready := t.readyLocked(func(o *templateSlot) bool { return o.p == s.p && o.machine.serves(m) })
		if len(ready) == 0 {
			return nil
		}
		s = slices.MinFunc(ready, func(a, b *templateSlot) int {
			return cmp.Or(cmp.Compare(a.machine.memoryMiB, b.machine.memoryMiB), cmp.Compare(a.machine.vcpus, b.machine.vcpus))
		})
	}
	s.at = time.Now()
	return &loan{s.template.retain(), s}
}

// drop forgets a template that did not work, and has it made anew: unless it was
// not long ago, then that is tried again after templateRetry. It reports whether
// it was still there.
func (t *templates) drop(l *loan, why error, from templateMaker) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := l.slot
	if t.byID[s.id] != s || s.template != l.template {
		return false
	}
	t.emptyLocked(s)
	if s.remade && time.Since(s.begun) < templateRetry {
		s.err, s.at = why, time.Now()
		return true
	}
	from.load = func(string) *template { return nil } // the one on the disk is the same
	t.startLocked(&templateSlot{id: s.id, machine: s.machine, p: s.p, remade: true}, from)
	return true
}

// replace forgets the templates of a platform that is no longer current and
// returns the machines that they were for, the one used last first.
func (t *templates) replace(current func(*platform) bool) (stale []*templateSlot) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for id, s := range t.byID {
		if current(s.p) {
			continue
		}
		delete(t.byID, id)
		t.emptyLocked(s)
		stale = append(stale, s)
	}
	slices.SortFunc(stale, func(a, b *templateSlot) int { return b.at.Compare(a.at) })
	return stale
}

// count returns how many templates are ready, and the errors of those that
// could not be made.
func (t *templates) count() (ready int, failures []error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, s := range t.byID {
		switch {
		case s.err != nil:
			failures = append(failures, s.err)
		case s.template != nil:
			ready++
		}
	}
	return ready, failures
}

// close waits for templates being made and frees all. Nothing may be wanted any
// more.
func (t *templates) close() {
	t.wait.Wait()
	t.replace(func(*platform) bool { return false })
}

func newDone() chan struct{} { return make(chan struct{}) }
