package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"nbd/nixproto"
	"nbd/store"
	"nbd/vm"
)

// A party is an account in a test of what is shared.
type party struct {
	store.Account
	bt  *buildTest
	env map[string]string
}

func (bt *buildTest) party(name string) *party {
	bt.t.Helper()
	a, err := bt.st.AddAccount(bt.t.Context(), name)
	if err != nil {
		bt.t.Fatal(err)
	}
	return &party{Account: a, bt: bt}
}

// alice is the account that buildTest has.
func (bt *buildTest) alice() *party { return &party{Account: bt.account, bt: bt} }

// with returns the party with a session environment.
func (p *party) with(env ...string) *party {
	q := *p
	q.env = map[string]string{}
	for i := 0; i < len(env); i += 2 {
		q.env[env[i]] = env[i+1]
	}
	return &q
}

// set sets a setting of the account.
func (p *party) set(name, value string) {
	p.bt.t.Helper()
	err := p.bt.st.ChangeSettings(p.bt.t.Context(), []store.SettingsOwner{{Account: p.ID}}, func(values []map[string]string) error {
		values[0][name] = value
		return nil
	})
	if err != nil {
		p.bt.t.Fatal(err)
	}
}

// build builds as the party, in a session of its own.
func (p *party) build(req *BuildRequest) (*nixproto.BuildResult, *fakeSink) {
	p.bt.t.Helper()
	s := p.bt.newSessionWith(p.Account, p.env)
	defer s.leases.Release()
	return p.buildIn(s, req)
}

func (p *party) buildIn(s *Session, req *BuildRequest) (*nixproto.BuildResult, *fakeSink) {
	p.bt.t.Helper()
	p.bt.flush()
	sink := newFakeSink()
	ctx, cancel := context.WithTimeout(p.bt.t.Context(), patience)
	defer cancel()
	r, err := p.bt.Build(ctx, s, req, sink)
	if err != nil {
		p.bt.t.Fatal(err)
	}
	return r, sink
}

// start is build in the background: it returns once the log has begun to
// arrive, and leave makes the client go away.
func (p *party) start(req *BuildRequest) (leave func(), done chan *nixproto.BuildResult, sink *fakeSink) {
	p.bt.t.Helper()
	p.bt.session = p.bt.newSessionWith(p.Account, p.env)
	_, leave, done, sink = joinTest(p.bt.t, p.bt, req)
	return leave, done, sink
}

// out is the content of the output "out" in the party's view.
func (p *party) out(req *BuildRequest) string {
	p.bt.t.Helper()
	info, err := p.bt.st.Info(p.bt.t.Context(), p.ID, req.Drv.Outputs["out"].Path)
	if err != nil {
		p.bt.t.Fatal(err)
	}
	public, err := nixproto.ParsePublicKey(p.PublicKey)
	if err != nil {
		p.bt.t.Fatal(err)
	}
	if len(info.Signatures) != 1 {
		p.bt.t.Errorf("%s has signatures %q", p.Name, info.Signatures)
	}
	if signers, err := info.CheckSignatures([]nixproto.PublicKey{public}); err != nil || len(signers) != 1 {
		p.bt.t.Errorf("%s's signature: %v, %v", p.Name, signers, err)
	}
	text, err := p.bt.readFile(p.bt.t.Context(), info)
	if err != nil {
		p.bt.t.Fatal(err)
	}
	return string(text)
}

// runs returns the records of the party's runs, requests those of all, oldest
// first.
func (p *party) runs() []store.Build {
	return slices.DeleteFunc(p.requests(), func(b store.Build) bool { return b.Reused })
}
func (p *party) requests() []store.Build { return p.bt.requestsOf(p.ID) }

// forget takes the output out of the party's view.
func (p *party) forget(req *BuildRequest) {
	p.bt.t.Helper()
	p.bt.session.leases.Release()
	p.bt.session = p.bt.newSession(p.bt.account)
	if _, err := p.bt.st.Delete(p.bt.t.Context(), p.ID, req.Drv.Outputs["out"].Path); err != nil {
		p.bt.t.Fatal(err)
	}
}

// random makes the builder "x" write something else in each run.
func random(bt *buildTest) *BuildRequest {
	bt.runner.act("x", func(f *fakeRun) error {
		f.say("run %d", f.try)
		return f.write("out", fmt.Sprint("run ", f.try), false)
	})
	return bt.request(drv("x"))
}

// failing makes the builder "x" fail, saying which run it was.
func failing(bt *buildTest, err error) *BuildRequest {
	bt.runner.act("x", func(f *fakeRun) error {
		f.say("\x00\xff\rmarker %d of run", f.try)
		return err
	})
	return bt.request(drv("x"))
}

func (bt *buildTest) wantRuns(n int) {
	bt.t.Helper()
	if got := bt.runner.count("x"); got != n {
		bt.t.Errorf("%d runs, want %d", got, n)
	}
}

// decided returns the check that decided a request.
func decided(b store.Build) string {
	for _, d := range b.Decisions {
		if d.Taken {
			return d.Check + ": " + d.Reason
		}
	}
	return ""
}

func TestReuseSuccess(t *testing.T) {
	bt := newBuildTest(t, nil)
	alice, bob := bt.alice(), bt.party("bob")
	req := random(bt)
	alice = alice.with("NBD_TAG_CASE", "secret")
	r, _ := alice.build(req)
	wantStatus(t, r, nixproto.Built)
	r, sink := bob.build(req)
	wantStatus(t, r, nixproto.Built)
	bt.wantRuns(1)
	if alice.out(req) != "run 1" || bob.out(req) != "run 1" {
		t.Errorf("outputs %q and %q", alice.out(req), bob.out(req))
	}
	if len(sink.notes) != 1 || !strings.Contains(sink.notes[0], "reused from an identical build of 20") {
		t.Errorf("notes %q", sink.notes)
	}
	bobs := bob.requests()
	if len(bobs) != 1 || !bobs[0].Reused || bobs[0].ReusedFrom != 0 || bobs[0].Status != store.StatusBuilt || bobs[0].CPUSeconds != 0 ||
		len(bobs[0].Tags) != 0 || len(bobs[0].Outputs) != 1 || !strings.HasPrefix(decided(bobs[0]), "success: reused from an identical build of") {
		t.Errorf("bob's record %+v", bobs)
	}
	alice.forget(req)
	r, sink = alice.build(req)
	wantStatus(t, r, nixproto.Built)
	bt.wantRuns(1)
	recs := alice.requests()
	if len(recs) != 2 || recs[1].ReusedFrom != recs[0].ID || !strings.Contains(fmt.Sprint(sink.notes), fmt.Sprintf("reused from build %d", recs[0].ID)) {
		t.Errorf("alice's records %+v, notes %q", recs, sink.notes)
	}
	if recs[0].Tags["CASE"] != "secret" || recs[0].CPUSeconds < 1 || decided(recs[0]) != "run: nothing stands in for a run" {
		t.Errorf("record of the run %+v", recs[0])
	}
	// Its log is the run's.
	for _, b := range []store.Build{recs[1], bobs[0]} {
		log, err := bt.Follow(t.Context(), b.Account, b.ID)
		if err != nil {
			t.Fatal(err)
		}
		if text, err := io.ReadAll(log); string(text) != "run 1\n" || err != nil {
			t.Errorf("log %q, %v", text, err)
		}
		log.Close()
	}
	r, _ = alice.build(req)
	wantStatus(t, r, nixproto.AlreadyValid)
	if got := decided(alice.requests()[2]); got != "outputs: all outputs are valid already" {
		t.Errorf("decided: %s", got)
	}
}

// Who has another content of an input, direct or not, has another build.
func TestReuseKeyIsOfContents(t *testing.T) {
	for _, transitive := range []bool{false, true} {
		bt := newBuildTest(t, nil)
		alice, bob, carol := bt.alice(), bt.party("bob"), bt.party("carol")
		dep := nixproto.StorePath(nixproto.StoreDir + "/" + strings.Repeat("a", nixproto.HashPartLen) + "-dep")
		mid := nixproto.StorePath(nixproto.StoreDir + "/" + strings.Repeat("b", nixproto.HashPartLen) + "-mid")
		give := func(p *party, content string) {
			t.Helper()
			d := bt.text("dep", content, nil)
			d.Info.Path, d.Info.CA = dep, ""
			m := bt.text("mid", string(dep), nil)
			m.Info.Path, m.Info.CA, m.Info.References = mid, "", []nixproto.StorePath{dep}
			if err := bt.st.Register(t.Context(), p.ID, []store.Registration{d, m}); err != nil {
				t.Fatal(err)
			}
		}
		give(alice, "alice's")
		give(bob, "bob's")
		give(carol, "alice's")
		bt.runner.act("x", func(f *fakeRun) error {
			for _, in := range f.spec.Inputs {
				if in.Path == dep {
					return f.write("out", in.NarHash.String(), false)
				}
			}
			return errors.New("no dep")
		})
		d := drv("x")
		d.InputSrcs = []nixproto.StorePath{dep}
		if transitive {
			d.InputSrcs = []nixproto.StorePath{mid}
		}
		req := bt.request(d)
		for _, p := range []*party{alice, bob, carol} {
			r, _ := p.build(req)
			wantStatus(t, r, nixproto.Built)
		}
		bt.wantRuns(2)
		if alice.out(req) == bob.out(req) || alice.out(req) != carol.out(req) {
			t.Errorf("transitive %v: outputs %q, %q, %q", transitive, alice.out(req), bob.out(req), carol.out(req))
		}
	}
}

func TestReuseFailure(t *testing.T) {
	bt := newBuildTest(t, nil)
	alice, bob := bt.alice(), bt.party("bob")
	req := failing(bt, exit(3))
	r, first := alice.build(req)
	wantError(t, r, nixproto.PermanentFailure, "exit code 3", "marker 1")
	hook := *req // whoever asks may call the derivation otherwise
	hook.DrvPath = nixproto.StorePath(strings.Replace(string(req.DrvPath), "-x.drv", "-x.drv", 1))
	r, sink := bob.build(&hook)
	wantError(t, r, nixproto.PermanentFailure, "exit code 3", "marker 1", "reused failure of an identical build of 20")
	bt.wantRuns(1)
	if a, b := first.log(req.DrvPath), sink.log(req.DrvPath); a != b || b != "\x00\xff\rmarker 1 of run\n" {
		t.Errorf("logs %q and %q", a, b)
	}
	if !strings.Contains(fmt.Sprint(sink.notes), "was not run: this is the reused failure of an identical build of 20") {
		t.Errorf("notes %q", sink.notes)
	}
	r, sink = alice.build(req)
	id := alice.runs()[0].ID
	wantError(t, r, nixproto.PermanentFailure, fmt.Sprintf("reused failure of build %d", id))
	if rec := alice.requests()[1]; !rec.Reused || rec.ReusedFrom != id || rec.Status != store.StatusBuildFailed {
		t.Errorf("record %+v", rec)
	}
	bt.wantRuns(1)

	// Off by setting, and by another sandbox.
	r, _ = bob.with("NIXBUILDNET_REUSE_BUILD_FAILURES", "false").build(req)
	wantError(t, r, nixproto.PermanentFailure, "marker 2")
	bt.wantRuns(2)
	bob.set("reuse-build-failures", "false")
	r, _ = bob.build(req)
	wantError(t, r, nixproto.PermanentFailure, "marker 3")
	r, _ = alice.build(req)
	wantError(t, r, nixproto.PermanentFailure, "marker 3", "reused failure of an identical") // the last one
	bt.runner.mu.Lock()
	bt.runner.generation = "fake 2"
	bt.runner.mu.Unlock()
	r, _ = alice.build(req)
	wantError(t, r, nixproto.PermanentFailure, "marker 4")
	bt.wantRuns(4)
	if got := alice.requests()[3].Decisions; !slices.ContainsFunc(got, func(d store.Decision) bool { return strings.Contains(d.Reason, "another sandbox") }) {
		t.Errorf("decisions %+v", got)
	}
}

// The first build after a start may come before the sandbox is known.
func TestReuseFirstFailure(t *testing.T) {
	bt := newBuildTest(t, nil)
	bt.runner.unknown = true
	req := failing(bt, exit(3))
	bt.alice().build(req)
	r, _ := bt.alice().build(req)
	wantError(t, r, nixproto.PermanentFailure, "marker 1", "reused failure")
	bt.wantRuns(1)
	var checks []string // all that was looked at, in the order of the rules
	for _, d := range bt.alice().requests()[1].Decisions {
		checks = append(checks, d.Check)
	}
	if want := []string{"outputs", "cache", "success", "failure"}; !slices.Equal(checks, want) {
		t.Errorf("checks %q, want %q", checks, want)
	}
}

// What is no truth about the build is not served to anybody again.
func TestReuseNeverOfDisturbedRuns(t *testing.T) {
	for name, c := range map[string]struct {
		err  error
		runs int
	}{
		"memory":     {&vm.BuildError{Kind: vm.OutOfMemory, Message: "m"}, 1},
		"space":      {&vm.BuildError{Kind: vm.NoSpace, Message: "m", ExitStatus: 1}, 1},
		"processes":  {&vm.BuildError{Kind: vm.ProcessLimit, Message: "m", ExitStatus: 1}, 1},
		"log limit":  {&vm.BuildError{Kind: vm.LogLimit, Message: "m"}, 1},
		"transient":  {errors.New("qemu died"), 1},
		"no space":   {store.ErrNoSpace, 1},
		"bad spec":   {&vm.SpecError{Message: "m"}, 1},
		"crash":      {&vm.BuildError{Kind: vm.Failed, Signal: 11}, 1},
		"crash code": {&vm.BuildError{Kind: vm.Failed, ExitStatus: 139}, 1},
	} {
		t.Run(name, func(t *testing.T) {
			bt := newBuildTest(t, func(cfg *BuildsConfig) { cfg.Retries, cfg.MemoryMiB, cfg.MaxMemoryMiB = -1, 1000, 1000 })
			bt.runner.status = vm.Status{Accel: "tcg"}
			req := failing(bt, c.err)
			for i, p := range []*party{bt.alice(), bt.party("bob"), bt.alice()} {
				r, _ := p.build(req)
				if r.Status.Success() {
					t.Errorf("status %d", r.Status)
				}
				bt.wantRuns(i + 1)
			}
		})
	}
}

func TestReuseCrashWithKVM(t *testing.T) {
	bt := newBuildTest(t, nil)
	bt.runner.status = vm.Status{Accel: "kvm"}
	req := failing(bt, &vm.BuildError{Kind: vm.Failed, Signal: 11})
	bt.alice().build(req)
	bt.party("bob").build(req)
	bt.wantRuns(1)
}

func TestReuseOfFixedOutputs(t *testing.T) {
	bt := newBuildTest(t, nil)
	alice, bob := bt.alice(), bt.party("bob")
	req := bt.request(fixedDrv(t, "x", "sha256", nixproto.SumSHA256([]byte("right"))))
	bt.runner.act("x", func(f *fakeRun) error {
		if f.try <= 2 {
			return f.write("out", "wrong", false)
		}
		return f.write("out", "right", false)
	})
	for _, p := range []*party{alice, bob} { // what failed may come tomorrow
		r, _ := p.build(req)
		wantError(t, r, nixproto.OutputRejected, "hash mismatch")
	}
	bt.wantRuns(2)
	for _, p := range []*party{alice, bob} {
		r, _ := p.build(req)
		wantStatus(t, r, nixproto.Built)
	}
	bt.wantRuns(3)
	// Another derivation with the same output is another build.
	other := fixedDrv(t, "x", "sha256", nixproto.SumSHA256([]byte("right")))
	other.Env["url"] = "elsewhere"
	carol := bt.party("carol")
	r, _ := carol.build(bt.request(other))
	wantStatus(t, r, nixproto.Built)
	bt.wantRuns(4)
}

func TestReuseTimeouts(t *testing.T) {
	bt := newBuildTest(t, nil)
	alice, bob := bt.alice(), bt.party("bob")
	reusing := bob.with("NBD_REUSE_BUILD_TIMEOUTS", "true")
	bt.runner.act("x", func(f *fakeRun) error {
		f.say("begun %d", f.try)
		<-f.ctx.Done()
		return f.ctx.Err()
	})
	limited := func(timeout, silent time.Duration) *BuildRequest {
		req := bt.request(drv("x"))
		req.Limits = Limits{Timeout: timeout, MaxSilent: silent}
		return req
	}
	r, _ := alice.build(limited(2*time.Second, 0))
	wantError(t, r, nixproto.TimedOut, "timed out after 2 seconds")
	bt.wantRuns(1)
	r, _ = bob.build(limited(time.Second, 0)) // off by default
	wantError(t, r, nixproto.TimedOut, "timed out after 1 seconds")
	bt.wantRuns(2)
	for _, timeout := range []time.Duration{time.Second, 2 * time.Second} { // the longest run counts
		r, sink := reusing.build(limited(timeout, 0))
		wantError(t, r, nixproto.TimedOut, "timed out after 2 seconds", "reused timeout of an identical")
		if sink.log(limited(0, 0).DrvPath) != "begun 1\n" {
			t.Errorf("log %q", sink.log(limited(0, 0).DrvPath))
		}
	}
	bt.wantRuns(2)
	// Silence is another kind, and no limit is longer than any.
	r, _ = reusing.build(limited(0, time.Second))
	wantError(t, r, nixproto.TimedOut, "of silence")
	bt.wantRuns(3)
	r, _ = reusing.build(limited(3*time.Second, 0))
	wantError(t, r, nixproto.TimedOut, "timed out after 3 seconds")
	bt.wantRuns(4)
	// A failure counts more, even for who does not want failures reused.
	bt.runner.act("x", func(f *fakeRun) error { return exit(1) })
	r, _ = alice.build(limited(time.Second, 0))
	wantStatus(t, r, nixproto.PermanentFailure)
	r, _ = reusing.build(limited(time.Second, 0))
	wantError(t, r, nixproto.PermanentFailure, "reused failure")
	bt.wantRuns(5)
	r, _ = bob.with("NBD_REUSE_BUILD_TIMEOUTS", "1", "NBD_REUSE_BUILD_FAILURES", "0").build(limited(time.Second, 0))
	wantStatus(t, r, nixproto.PermanentFailure)
	bt.wantRuns(6)
	bt.runner.act("x", nil)
	r, _ = alice.with("NBD_REUSE_BUILD_FAILURES", "").build(limited(time.Second, 0))
	wantStatus(t, r, nixproto.Built)
	r, _ = reusing.build(limited(time.Second, 0))
	wantStatus(t, r, nixproto.Built)
	bt.wantRuns(7)
}

func TestReuseSettings(t *testing.T) {
	bt := newBuildTest(t, nil)
	alice, bob, carol, dave := bt.alice(), bt.party("bob"), bt.party("carol"), bt.party("dave")
	bob.set("share-results", "false")
	req := random(bt)
	for i, c := range []struct {
		p    *party
		runs int
		out  string
	}{
		{bob, 1, "run 1"},   // kept for himself
		{alice, 2, "run 2"}, // shared
		{bob, 2, "run 1"},   // his own
		{carol, 2, "run 2"}, // alice's
		{dave.with("NBD_REUSE_RESULTS", "own"), 3, "run 3"}, // nobody's, and his is not the first that is shared
		{dave.with("NBD_REUSE_RESULTS", "own"), 3, "run 3"}, // his own
		{dave.with("NBD_REUSE_RESULTS", "none"), 4, "run 4"},
		{dave, 4, "run 3"}, // his own goes before alice's
		{carol, 4, "run 2"},
	} {
		r, _ := c.p.build(req)
		wantStatus(t, r, nixproto.Built)
		bt.wantRuns(c.runs)
		if got := c.p.out(req); got != c.out {
			t.Errorf("step %d: %s has %q, want %q", i, c.p.Name, got, c.out)
		}
		c.p.forget(req)
	}
	// What was shared is not, once its account says so.
	alice.set("share-results", "false")
	r, _ := carol.build(req)
	wantStatus(t, r, nixproto.Built)
	bt.wantRuns(5)
}

// A result whose bytes are gone does not count, and is replaced.
func TestReuseOfWhatIsGone(t *testing.T) {
	bt := newBuildTest(t, nil)
	alice, bob := bt.alice(), bt.party("bob")
	req := random(bt)
	alice.build(req)
	alice.forget(req)
	if _, err := bt.st.Sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	r, _ := bob.build(req)
	wantStatus(t, r, nixproto.Built)
	bt.wantRuns(2)
	r, _ = alice.build(req)
	wantStatus(t, r, nixproto.Built)
	bt.wantRuns(2)
	if alice.out(req) != "run 2" {
		t.Errorf("alice has %q", alice.out(req))
	}
}

func TestReuseRevoke(t *testing.T) {
	bt := newBuildTest(t, nil)
	alice, bob, carol := bt.alice(), bt.party("bob"), bt.party("carol")
	req := random(bt)
	alice.build(req)
	rec := alice.runs()[0]
	key, n, err := bt.Revoke(t.Context(), fmt.Sprint(rec.ID))
	if err != nil || key != rec.Key || n != 1 {
		t.Errorf("revoked %s, %d, %v", key, n, err)
	}
	bob.build(req)
	bt.wantRuns(2)
	if _, n, err := bt.Revoke(t.Context(), key); err != nil || n != 1 {
		t.Errorf("revoked %d, %v", n, err)
	}
	carol.build(req)
	bt.wantRuns(3)
	for what, want := range map[string]error{"99": store.ErrNotFound, "x": store.ErrInvalid} {
		if _, _, err := bt.Revoke(t.Context(), what); !errors.Is(err, want) {
			t.Errorf("revoke %q: %v", what, err)
		}
	}
}

// --check always runs, and does not replace what is known.
func TestReuseNotByCheck(t *testing.T) {
	bt := newBuildTest(t, nil)
	alice, bob := bt.alice(), bt.party("bob")
	req := random(bt)
	alice.build(req)
	check := *req
	check.Mode = nixproto.BuildCheck
	r, _ := alice.build(&check)
	wantError(t, r, nixproto.NotDeterministic, "differs")
	bt.wantRuns(2)
	bob.build(req)
	bt.wantRuns(2)
	if bob.out(req) != "run 1" {
		t.Errorf("bob has %q", bob.out(req))
	}
}

// Many accounts ask for few builds, come, go and cancel; runs fail, break and
// succeed. Nothing that the rules share runs twice at once, and nobody is given
// what a broken run left.
func TestReuseUnderLoad(t *testing.T) {
	bt := newBuildTest(t, func(c *BuildsConfig) { c.Retries = 20 })
	const builds, accounts, rounds = 4, 5, 12
	var mu sync.Mutex
	running := map[string]int{}
	ended := map[string]int{} // successes by name
	for i := range builds {
		name := fmt.Sprint("b", i)
		bt.runner.act(name, func(f *fakeRun) error {
			mu.Lock()
			running[name]++
			twice, after := running[name] > 1, ended[name] > 0
			mu.Unlock()
			if twice || after {
				t.Errorf("%s runs twice at once (%v), or again after it succeeded (%v)", name, twice, after)
			}
			defer func() { mu.Lock(); running[name]--; mu.Unlock() }()
			f.say("run %d", f.try)
			if f.try%3 != 0 {
				return errors.New("broke")
			}
			if err := f.write("out", fmt.Sprint(name, " run ", f.try), false); err != nil {
				return err
			}
			mu.Lock()
			ended[name]++
			mu.Unlock()
			return f.ctx.Err()
		})
	}
	var reqs []*BuildRequest
	for i := range builds {
		reqs = append(reqs, bt.request(drv(fmt.Sprint("b", i))))
	}
	var parties []*party
	for i := range accounts {
		parties = append(parties, bt.party(fmt.Sprint("p", i)))
	}
	var wg sync.WaitGroup
	for i, p := range parties {
		for round := range rounds {
			s := bt.newSession(p.Account)
			wg.Go(func() {
				req := reqs[(i+round)%builds]
				ctx, cancel := context.WithTimeout(t.Context(), patience)
				defer cancel()
				r, err := bt.Build(ctx, s, req, newFakeSink())
				if err != nil {
					t.Error(err)
				} else if !r.Status.Success() {
					t.Errorf("%s: status %d, %s", req.Drv.Name, r.Status, r.Error)
				} else if got := p.out(req); !strings.HasSuffix(got, "run 3") {
					t.Errorf("%s has %q", p.Name, got)
				}
			})
		}
	}
	wg.Wait()
	mu.Lock()
	defer mu.Unlock()
	for name, n := range maps.All(ended) {
		if n != 1 {
			t.Errorf("%s succeeded %d times", name, n)
		}
	}
	if len(bt.live.m) != 0 || len(bt.live.claims) != 0 {
		t.Errorf("left: %v, %v", bt.live.m, bt.live.claims)
	}
}

// After a crash between the end of a run and its answer the run still counts.
func TestReuseAfterACrash(t *testing.T) {
	bt := newBuildTest(t, nil)
	req := random(bt)
	bt.alice().build(req)
	again := newBuildTestOn(t, afterCrash(t, bt.dir), nil)
	req2 := random(again)
	bob := again.party("bob")
	r, _ := bob.build(req2)
	wantStatus(t, r, nixproto.Built)
	again.wantRuns(0)
	if bob.out(req2) != "run 1" || req.DrvPath != req2.DrvPath {
		t.Errorf("bob has %q", bob.out(req2))
	}
	// What ran then has broken, and runs again when it is asked for.
	waiting, open := gated(again)
	waiting = again.request(drv("y"))
	again.runner.act("y", again.runner.acts["x"])
	_, done, _ := bob.start(waiting)
	if runs := bob.runs(); len(runs) != 1 || runs[0].Status != store.StatusRunning {
		t.Errorf("runs %+v", runs)
	}
	third := newBuildTestOn(t, afterCrash(t, again.dir), nil)
	open <- nil
	wantStatus(t, <-done, nixproto.Built)
	bob3 := &party{Account: bob.Account, bt: third}
	if runs := bob3.runs(); len(runs) != 1 || runs[0].Status != store.StatusInternalError || runs[0].CPUSeconds != 0 {
		t.Errorf("runs after a crash %+v", runs)
	}
	r, _ = bob3.build(waiting)
	wantStatus(t, r, nixproto.Built)
	if third.runner.count("y") != 1 {
		t.Error("it did not run again")
	}
}

// afterCrash is a copy of a state directory as a crash at this moment leaves it.
func afterCrash(t *testing.T, dir string) string {
	t.Helper()
	to := t.TempDir()
	if err := os.CopyFS(to, os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	return to
}
