package server

import (
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"nbd/nixproto"
	"nbd/store"
)

// loseLogs deletes the stored logs of builds.
func (bt *buildTest) loseLogs() {
	bt.t.Helper()
	n := 0
	err := filepath.WalkDir(filepath.Join(bt.dir, "logs"), func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		n++
		return os.Remove(path)
	})
	if err != nil || n == 0 {
		bt.t.Fatalf("%d logs, %v", n, err)
	}
}

// TestReuseWithoutItsLog: a failure or timeout whose log is gone cannot be told
// again, and answers nobody; the next one does.
func TestReuseWithoutItsLog(t *testing.T) {
	bt := newBuildTest(t, nil)
	bob := bt.party("bob").with("NBD_REUSE_BUILD_TIMEOUTS", "true", "NBD_TIMEOUT", "1")
	bt.runner.act("fails", func(f *fakeRun) error { f.say("why it fails"); return exit(3) })
	req := bt.request(drv("fails"))
	bt.alice().build(req)
	bt.loseLogs()
	r, sink := bob.build(req)
	wantError(t, r, nixproto.PermanentFailure, "exit code 3")
	if strings.Contains(r.Error, "reused") || sink.log(req.DrvPath) != "why it fails\n" || bt.runner.count("fails") != 2 {
		t.Errorf("%d runs, %q, %q", bt.runner.count("fails"), r.Error, sink.log(req.DrvPath))
	}
	reasons := bob.requests()[0].Decisions
	if !slices.ContainsFunc(reasons, func(d store.Decision) bool {
		return d.Check == "failure" && !d.Taken && strings.Contains(d.Reason, "log is not stored")
	}) {
		t.Errorf("reasons %+v", reasons)
	}
	r, sink = bt.alice().build(req)
	wantError(t, r, nixproto.PermanentFailure, "reused failure")
	if sink.log(req.DrvPath) != "why it fails\n" || bt.runner.count("fails") != 2 {
		t.Errorf("%d runs, %q", bt.runner.count("fails"), sink.log(req.DrvPath))
	}
}

// borrower is a session of a party to which accounts lend what they have.
func (p *party) borrower(from ...store.AccountID) *Session {
	p.bt.t.Helper()
	s := p.bt.newSessionWith(p.Account, nil)
	s.Sight = p.bt.st.NewSight(p.ID, store.Trust{Linked: from})
	s.leases = s.Sight.NewLease()
	p.bt.t.Cleanup(s.leases.Release)
	return s
}

// TestReuseWithLentInputs: who builds from what is only lent to him is answered
// by reuse like anybody, and what he gets stays his when the link ends, with all
// that it refers to.
func TestReuseWithLentInputs(t *testing.T) {
	bt := newBuildTest(t, nil)
	alice, frank := bt.alice(), bt.party("frank") // frank has inputs of his own, and builds
	var dep, lib nixproto.StorePath
	for _, p := range []*party{alice, frank} {
		dep = bt.addFor(p.ID, "dep", "what the library needs")
		lib = bt.addFor(p.ID, "lib", "a library that needs "+string(dep), dep)
	}
	request := func(name string) *BuildRequest {
		d := drv(name)
		d.InputSrcs = []nixproto.StorePath{lib}
		d.Env["content"] = "linked with " + string(lib)
		return bt.request(d)
	}
	keeps := func(p *party, req *BuildRequest) {
		t.Helper()
		out := req.Drv.Outputs["out"].Path
		want := []nixproto.StorePath{dep, lib, out}
		slices.Sort(want)
		alone := bt.newSessionWith(p.Account, nil) // of no link
		infos, err := alone.Sight.ClosureInfo(t.Context(), []nixproto.StorePath{out})
		var have []nixproto.StorePath
		for _, info := range infos {
			have = append(have, info.Path)
			if _, err := bt.st.Info(t.Context(), p.ID, info.Path); err != nil {
				t.Errorf("%s: %v", p.Name, err)
			}
		}
		if slices.Sort(have); err != nil || !slices.Equal(have, want) {
			t.Errorf("%s keeps %v, %v", p.Name, have, err)
		}
		if got := p.out(req); got != "linked with "+string(lib) {
			t.Errorf("%s has %q", p.Name, got)
		}
	}

	// By a stored success.
	bob, req := bt.party("bob"), request("stored")
	frank.build(req)
	r, _ := bob.buildIn(bob.borrower(alice.ID), req)
	wantStatus(t, r, nixproto.Built)
	keeps(bob, req)

	// By a running build, and by a run of his own that others reuse.
	carol, joined := bt.party("carol"), request("joined")
	goOn := make(chan struct{})
	bt.runner.act("joined", func(f *fakeRun) error { f.say("begun"); <-goOn; return f.writeContent() })
	_, franks, _ := frank.start(joined)
	bt.session = carol.borrower(alice.ID)
	_, _, carols, _ := joinTest(t, bt, joined)
	close(goOn)
	wantStatus(t, <-franks, nixproto.Built)
	wantStatus(t, <-carols, nixproto.Built)
	keeps(carol, joined)
	dave, own := bt.party("dave"), request("own")
	r, _ = dave.buildIn(dave.borrower(alice.ID), own)
	wantStatus(t, r, nixproto.Built)
	keeps(dave, own)
	r, _ = frank.build(own)
	wantStatus(t, r, nixproto.Built)
	keeps(frank, own)
	for _, name := range []string{"stored", "joined", "own"} {
		if n := bt.runner.count(name); n != 1 {
			t.Errorf("%s: %d runs", name, n)
		}
	}

	// Without the link there is nothing to build from.
	erin := bt.party("erin")
	r, _ = erin.build(req)
	wantError(t, r, nixproto.MiscFailure, string(lib))

	// Nor is it alice's to take away.
	for _, p := range []nixproto.StorePath{lib, dep} {
		if _, err := bt.st.Delete(t.Context(), alice.ID, p); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := bt.st.Sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	keeps(bob, req)
	keeps(carol, joined)
	keeps(dave, own)
}
