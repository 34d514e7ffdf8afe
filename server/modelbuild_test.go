package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"testing/synctest"
	"time"

	"nbd/nixproto"
	"nbd/store"
	"nbd/store/storetest"
	"nbd/vm"
)

// A script is what the runs of one flight do.
type script struct {
	open     chan struct{} // closed when the first one may go on
	outcomes []outcome
	logs     []string // of the attempts so far
}

// An outcome is how one attempt ends.
type outcome struct {
	kind  string
	texts map[string]string // by output
}

// A pending is a request on its way.
type pending struct {
	*ask
	verdict
	id     store.BuildID
	leave  context.CancelCauseFunc
	sink   *fakeSink
	result chan *nixproto.BuildResult
	lease  *store.Lease
	gone   bool // its client is, and it goes on
}

// run is what every builder does: what the script of its flight says.
func (m *modelTest) run(f *fakeRun) error {
	m.mu.Lock()
	s := m.scripts[f.ctx]
	if s == nil {
		if s = m.next; s == nil {
			m.mu.Unlock()
			m.t.Errorf("step %d: %s runs, and should not", m.step, f.spec.Drv.Name)
			return exit(99)
		}
		m.next, m.scripts[f.ctx] = nil, s
	}
	m.runs++
	n := len(s.logs)
	s.logs = append(s.logs, fmt.Sprintf("run %d\n", m.runs))
	log := s.logs[n]
	m.mu.Unlock()
	if _, err := f.log.Write([]byte(log)); err != nil {
		return err
	}
	select {
	case <-s.open:
	case <-f.ctx.Done():
		return f.ctx.Err()
	}
	if n >= len(s.outcomes) {
		m.t.Errorf("step %d: %s runs once more", m.step, f.spec.Drv.Name)
		return exit(99)
	}
	o := s.outcomes[n]
	if err := o.err(); err != nil {
		return err
	}
	for _, out := range f.spec.Outputs {
		if err := f.write(out.Name, o.texts[out.Name], false); err != nil {
			return err
		}
	}
	return nil
}

// err is what the guest of an attempt says.
func (o *outcome) err() error {
	switch o.kind {
	case "exit":
		return exit(3)
	case "crash":
		return &vm.BuildError{Kind: vm.Failed, Signal: 11}
	case "missing":
		return &vm.BuildError{Kind: vm.OutputMissing, Message: "missing"}
	case "log limit":
		return &vm.BuildError{Kind: vm.LogLimit, Message: "log"}
	case "memory":
		return &vm.BuildError{Kind: vm.OutOfMemory, Message: "memory", ExitStatus: 1}
	case "space":
		return &vm.BuildError{Kind: vm.NoSpace, Message: "space", ExitStatus: 1}
	case "processes":
		return &vm.BuildError{Kind: vm.ProcessLimit, Message: "processes", ExitStatus: 1}
	case "broken":
		return errors.New("the guest broke")
	}
	return nil
}

// newAsk makes up a request.
func (m *modelTest) newAsk(d *modelDrv) *ask {
	a := m.pick()
	for _, p := range d.inputs {
		if m.usable(a, p) == nil && !m.chance(4) {
			m.bring(a, p, &content{by: map[string]bool{}}, 0)
		}
	}
	q := &ask{who: a, drv: d, policy: a.policy, rebuild: m.chance(12)}
	p := &q.policy
	if m.chance(6) {
		p.reuse = oneOf(m, []string{"all", "own", "none"})
	}
	if m.chance(4) {
		p.failures = !p.failures
	}
	if m.chance(4) {
		p.timeouts = !p.timeouts
	}
	p.keep, p.restarts, p.patient = m.chance(6), 1+m.step%2, m.chance(3) // one number for all who may wait for one another
	if m.chance(4) {
		p.limited = oneOf(m, []string{store.TimeoutRun, store.TimeoutSilent})
	}
	return q
}

// start sends a request and waits until it was answered, or waits for a run.
func (m *modelTest) start(q *ask) *pending {
	m.t.Helper()
	p := &pending{ask: q, verdict: m.decide(q), sink: newFakeSink(), result: make(chan *nixproto.BuildResult, 1)}
	m.answers[p.verdict.by]++
	session := m.modelSession(p)
	req := &BuildRequest{DrvPath: q.drv.path, Drv: q.drv.drv}
	if q.rebuild {
		req.Mode = nixproto.BuildCheck
	}
	const short, long = time.Second, time.Hour
	if q.policy.patient {
		req.Limits = Limits{Timeout: long, MaxSilent: long}
	}
	switch q.policy.limited {
	case store.TimeoutRun:
		req.Limits.Timeout = short
	case store.TimeoutSilent:
		req.Limits.MaxSilent = short
	}
	waits := p.verdict.by == "run" || p.verdict.by == "running"
	if p.verdict.by == "run" {
		p.flight.script = &script{open: make(chan struct{})}
		m.flights = append(m.flights, p.flight)
		m.mu.Lock()
		m.next = p.flight.script
		m.mu.Unlock()
	}
	ctx, leave := context.WithCancelCause(context.Background())
	p.leave = leave
	before := m.liveOf(q.who.ID)
	go func() {
		r, err := m.Build(ctx, session, req, p.sink)
		if err != nil && !errors.Is(err, errGone) && !errors.Is(err, errEnding) {
			m.t.Errorf("step %d: build: %v", m.step, err)
		}
		p.result <- r
	}()
	if !waits {
		m.checkAnswered(p, m.await(p))
		return p
	}
	p.flight.waiters = append(p.flight.waiters, p)
	if q.policy.limited != "" {
		m.checkLimited(p, m.await(p))
		return p
	}
	select {
	case <-p.sink.grown:
	case r := <-p.result:
		m.t.Fatalf("step %d: %s by %s was answered with %+v, want %s", m.step, q.drv.drv.Name, q.who.Name, r, p.verdict.by)
	case <-time.After(patience):
		m.t.Fatalf("step %d: %s by %s has no log, want %s", m.step, q.drv.drv.Name, q.who.Name, p.verdict.by)
	}
	for _, id := range m.liveOf(q.who.ID) {
		if !slices.Contains(before, id) {
			p.id = id
		}
	}
	return p
}

// modelSession is what the server makes for a client.
func (m *modelTest) modelSession(p *pending) *Session {
	sight := m.sight(p.who)
	p.lease = sight.NewLease()
	s := &Session{
		ID: "model", book: m.book, Client: &Client{Account: p.who.Account, Permissions: store.Permissions()},
		Sight: sight, Log: slog.New(slog.DiscardHandler), leases: p.lease,
		Env: map[string]string{
			"NBD_REUSE_RESULTS":        p.policy.reuse,
			"NBD_REUSE_BUILD_FAILURES": fmt.Sprint(p.policy.failures),
			"NBD_REUSE_BUILD_TIMEOUTS": fmt.Sprint(p.policy.timeouts),
			"NBD_KEEP_BUILDS_RUNNING":  fmt.Sprint(p.policy.keep),
			"NBD_MAX_BUILD_RESTARTS":   fmt.Sprint(p.policy.restarts),
		},
	}
	m.must(s.setSettings())
	return s
}

// ask is one request from its beginning to its end.
func (m *modelTest) ask() {
	p := m.start(m.newAsk(oneOf(m, m.drvs)))
	if len(m.flights) > 0 && m.chance(8) {
		m.end(p)
	}
	m.land()
}

// together are some requests of the same derivation at once.
func (m *modelTest) together() {
	d := oneOf(m, m.drvs)
	var all []*pending
	for range 2 + m.rng.IntN(4) {
		all = append(all, m.start(m.newAsk(d)))
		if m.t.Failed() {
			return
		}
	}
	for _, p := range all {
		if m.chance(4) {
			m.end(p)
		}
	}
	switch m.rng.IntN(10) {
	case 0:
		m.crash()
	case 1:
		m.restartBusy()
	case 2:
		m.sweep()
		fallthrough
	default:
		m.land()
	}
}

// waits reports whether a request waits for a flight.
func (m *modelTest) waits(p *pending) bool {
	return slices.ContainsFunc(m.flights, func(f *modelFlight) bool { return slices.Contains(f.waiters, p) })
}

// end ends a request that waits: its client goes, or cancels it. Others go on.
func (m *modelTest) end(p *pending) {
	if !m.waits(p) || p.gone {
		return
	}
	status := store.StatusCancelled
	if m.chance(2) {
		m.must(m.Cancel(m.t.Context(), p.who.ID, p.id, ""))
		if r := m.await(p); r == nil || r.Status.Success() {
			m.t.Errorf("step %d: a cancelled build: %+v", m.step, r)
		}
	} else {
		p.leave(errGone)
		m.await(p)
		if p.policy.keep {
			p.gone = true
			return
		}
		status = store.StatusClientDisconnect
	}
	m.leaveFlight(p)
	m.checkRecord(p, status)
}

// leaveFlight takes a request out of its flight. The last one ends it.
func (m *modelTest) leaveFlight(p *pending) {
	f := p.flight
	f.waiters = slices.DeleteFunc(f.waiters, func(o *pending) bool { return o == p })
	if len(f.waiters) == 0 {
		m.flights = slices.DeleteFunc(m.flights, func(o *modelFlight) bool { return o == f })
		m.settleDown()
	}
}

// await waits for the answer of a request.
func (m *modelTest) await(p *pending) *nixproto.BuildResult {
	m.t.Helper()
	select {
	case r := <-p.result:
		p.lease.Release()
		return r
	case <-time.After(patience):
		m.t.Fatalf("step %d: %s by %s is not answered, want %s", m.step, p.drv.drv.Name, p.who.Name, p.verdict.by)
	}
	return nil
}

// settleDown waits until all that was begun has ended, but for the runs that
// are to go on.
func (m *modelTest) settleDown() { synctest.Wait() }

// land ends all flights, as chance has it.
func (m *modelTest) land() {
	for len(m.flights) > 0 && !m.t.Failed() {
		f := m.flights[0]
		m.landOne(f)
	}
}

// landOne makes up how the runs of a flight end, and compares what comes of it
// for each that waits. The first of them owns the run.
func (m *modelTest) landOne(f *modelFlight) {
	m.t.Helper()
	owner := f.waiters[0]
	restarts := 0
	for _, p := range f.waiters {
		restarts = max(restarts, p.policy.restarts)
	}
	s := f.script
	for broken, small := 0, true; ; {
		o := m.outcome(owner.ask)
		s.outcomes = append(s.outcomes, o)
		if o.kind == "broken" && broken < restarts {
			broken++
		} else if o.kind == "memory" && small {
			small = false
		} else {
			break
		}
	}
	last := s.outcomes[len(s.outcomes)-1]
	end, code, status := m.ended(owner, last)
	close(s.open)
	for _, p := range f.waiters {
		if p.gone {
			continue
		}
		if r := m.await(p); r == nil || r.Status != code {
			m.t.Errorf("step %d: %s by %s after %v: %+v", m.step, p.drv.drv.Name, p.who.Name, s.outcomes, r)
		}
	}
	m.flights = slices.DeleteFunc(m.flights, func(o *modelFlight) bool { return o == f })
	m.settleDown()
	if len(s.logs) != len(s.outcomes) {
		m.t.Errorf("step %d: %d runs for %v", m.step, len(s.logs), s.outcomes)
		return
	}
	end.log = s.logs[len(s.logs)-1]
	run := m.checkRecord(owner, status)
	if run.Reused {
		m.t.Errorf("step %d: the record of a run is %+v", m.step, run)
	}
	end.build = run.ID
	switch {
	case owner.rebuild:
	case end.outs != nil:
		m.succeeded(owner.ask, end)
	case last.kind == "exit", last.kind == "missing", last.kind == "crash" && !m.emulated:
		m.failed(owner.ask, end)
	}
	for _, p := range f.waiters {
		b := m.checkRecord(p, status)
		if p != owner && b.ReusedFrom != 0 && p.who != owner.who {
			m.t.Errorf("step %d: %s is told of build %d", m.step, p.who.Name, b.ReusedFrom)
		}
		if got := p.sink.log(p.drv.path); !p.gone && got != strings.Join(s.logs, "") {
			m.t.Errorf("step %d: %s saw %q, want %q, after %v; %+v", m.step, p.who.Name, got, s.logs, s.outcomes, p.policy)
		}
		if end.outs != nil && !p.rebuild {
			m.grant(p.ask, end)
		}
	}
}

// outcome makes up how an attempt ends.
func (m *modelTest) outcome(q *ask) outcome {
	o := outcome{kind: "ok", texts: map[string]string{}}
	if m.chance(2) {
		o.kind = oneOf(m, []string{"exit", "exit", "crash", "missing", "log limit", "memory", "space", "processes", "broken", "broken"})
	}
	if q.drv.fixed {
		o.texts["out"] = rightText
		if m.chance(4) {
			o.texts["out"] = "something else"
		}
		return o
	}
	again := q.rebuild && m.chance(2) // the same, if that is known
	for _, name := range slices.Sorted(maps.Keys(q.drv.outs)) {
		m.texts++
		text := fmt.Sprint("made ", m.texts)
		if m.chance(2) {
			text = fmt.Sprint("often made ", m.rng.IntN(2))
		}
		for _, p := range append(slices.Clone(q.drv.inputs), q.drv.outs[name]) {
			if m.chance(2) {
				text += " " + string(p)
			}
		}
		if c := m.usable(q.who, q.drv.outs[name]); again && c != nil && m.made[c.hash] != "" {
			text = m.made[c.hash]
		}
		o.texts[name] = text
	}
	return o
}

// ended is what comes of an attempt that is the last one.
func (m *modelTest) ended(owner *pending, o outcome) (end *knownEnd, code nixproto.BuildStatus, status string) {
	end = &knownEnd{account: owner.who.ID}
	switch o.kind {
	case "exit", "crash":
		if owner.drv.fixed { // the network may be better another time
			return end, nixproto.TransientFailure, store.StatusBuildFailed
		}
		return end, nixproto.PermanentFailure, store.StatusBuildFailed
	case "missing":
		return end, nixproto.OutputRejected, store.StatusBuildFailed
	case "log limit":
		return end, nixproto.LogLimitExceeded, store.StatusLogLimit
	case "memory", "space", "processes":
		return end, nixproto.MiscFailure, store.StatusMaxMemoryExceeded
	case "broken":
		return end, nixproto.TransientFailure, store.StatusInternalError
	}
	if owner.drv.fixed && o.texts["out"] != rightText {
		return end, nixproto.OutputRejected, store.StatusBuildFailed
	}
	outs := map[string]*content{}
	for name, text := range o.texts {
		c := &content{hash: nixproto.SumSHA256(storetest.File(text, false))}
		for _, p := range m.allPaths() {
			if strings.Contains(text, string(p)) {
				c.refs = append(c.refs, p)
			}
		}
		m.made[c.hash] = text
		outs[name] = c
		if owner.rebuild && m.usable(owner.who, owner.drv.outs[name]).hash != c.hash {
			code = nixproto.NotDeterministic
		}
	}
	if code != 0 {
		return end, code, store.StatusBuildFailed
	}
	end.outs = outs
	return end, nixproto.Built, store.StatusBuilt
}

// crash goes on with what a crash in the midst of all leaves: nothing of what
// ran.
func (m *modelTest) crash() {
	m.sweep() // which writes what is pending: a copy is not made in one moment
	dir := afterCrash(m.t, m.dir)
	m.stop()
	m.open(dir)
	m.noneRuns()
}

// restartBusy ends the server while it builds.
func (m *modelTest) restartBusy() {
	dir := m.dir
	m.stop()
	m.open(dir)
	m.noneRuns()
}

// stop ends the server and everything under way.
func (m *modelTest) stop() {
	m.Builds.Close()
	for _, f := range m.flights {
		for _, p := range f.waiters {
			if p.gone {
				continue
			}
			if r := m.await(p); r != nil && r.Status.Success() {
				m.t.Errorf("step %d: a run that was ended: %+v", m.step, r)
			}
		}
	}
	m.flights = nil
	m.must(m.st.Close())
}

func (m *modelTest) noneRuns() {
	for id := range m.members {
		for _, b := range m.requestsOf(id) {
			if b.Status == store.StatusPending || b.Status == store.StatusRunning {
				m.t.Errorf("step %d: build %d is %s after a start", m.step, b.ID, b.Status)
			}
		}
	}
}
