package server

import (
	"strings"
	"testing"

	"nbd/nixproto"
	"nbd/store"
)

// older puts an output of d that refers to a path into the party's view, as if
// it had been built before.
func (p *party) older(path nixproto.StorePath, refs ...nixproto.StorePath) {
	p.bt.t.Helper()
	reg := p.bt.text("older", "an older output", nil)
	reg.Info.Path, reg.Info.References, reg.Info.CA = path, refs, ""
	if err := p.bt.st.Register(p.bt.t.Context(), p.ID, []store.Registration{reg}); err != nil {
		p.bt.t.Fatal(err)
	}
}

// TestOutputBesideAnOlderOne: what a view has already stays, and new outputs must
// be what the derivation demands beside that, too. It is nobody else's trouble.
func TestOutputBesideAnOlderOne(t *testing.T) {
	bt := newBuildTest(t, nil)
	alice, bob := bt.alice(), bt.party("bob")
	extra := bt.add("extra", "not allowed")
	make := func(name string) *BuildRequest {
		d := drv(name, "out", "dev")
		d.Env["content"], d.Env["allowedRequisites"] = "$dev", "out dev"
		bt.runner.act(name, func(f *fakeRun) error {
			if err := f.write("dev", "refers to nothing", false); err != nil {
				return err
			}
			return f.write("out", f.path("dev"), false)
		})
		return bt.request(d)
	}

	req := make("pair")
	alice.older(req.Drv.Outputs["dev"].Path, extra)
	r, _ := alice.build(req)
	wantError(t, r, nixproto.OutputRejected, "not allowed to refer", string(extra))
	if b := alice.runs()[0]; b.Status != store.StatusClientError || b.CPUSeconds != 0 || b.LimitSeconds == 0 {
		t.Errorf("record %+v", b)
	}
	r, _ = bob.build(req)
	wantStatus(t, r, nixproto.Built)
	if n := bt.runner.count("pair"); n != 2 {
		t.Errorf("%d runs, want 2", n)
	}
	// A stored success is no way around it.
	r, _ = alice.build(req)
	wantError(t, r, nixproto.OutputRejected, "not allowed to refer", string(extra))
	if valid, err := bt.st.Valid(t.Context(), alice.ID, []nixproto.StorePath{req.Drv.Outputs["out"].Path}); err != nil || len(valid) != 0 {
		t.Errorf("valid: %v, %v", valid, err)
	}

	// One that is as it must be stays, beside the new one.
	req = make("fits")
	alice.older(req.Drv.Outputs["dev"].Path)
	r, _ = alice.build(req)
	wantStatus(t, r, nixproto.Built)
	if text := bt.content(req.Drv.Outputs["dev"].Path); text != "an older output" {
		t.Errorf("the older output is %q now", text)
	}
	r, _ = bob.build(req)
	wantStatus(t, r, nixproto.Built)
	if n := bt.runner.count("fits"); n != 1 {
		t.Errorf("%d runs, want 1", n)
	}
}

// TestOutputsPastMaxStorage: outputs that an account has no room for do not enter
// its view; the build has not failed, and answers others.
func TestOutputsPastMaxStorage(t *testing.T) {
	bt := newBuildTest(t, nil)
	alice, bob := bt.alice(), bt.party("bob")
	alice.set("max-storage", "500")
	meter := &storageMeter{sizes: bt.st}
	build := func(p *party, req *BuildRequest) *nixproto.BuildResult {
		s := bt.newSessionWith(p.Account, nil)
		s.storage = meter
		r, _ := p.buildIn(s, req)
		return r
	}
	big := func(name string) *BuildRequest {
		d := drv(name)
		d.Env["content"] = strings.Repeat("x", 1000)
		return bt.request(d)
	}

	req := big("big")
	wantError(t, build(alice, req), nixproto.MiscFailure, "max-storage", string(req.DrvPath))
	if b := alice.runs()[0]; b.Status != store.StatusClientError || b.CPUSeconds != 0 || b.LimitSeconds == 0 {
		t.Errorf("record %+v", b)
	}
	wantStatus(t, build(bob, req), nixproto.Built) // runs: the first one's bytes went nowhere
	wantError(t, build(alice, req), nixproto.MiscFailure, "max-storage")
	if b := alice.requests()[1]; !b.Reused || b.Status != store.StatusClientError || b.ReusedFrom != 0 {
		t.Errorf("record %+v", b)
	}
	if n := bt.runner.count("big"); n != 2 {
		t.Errorf("%d runs, want 2", n)
	}
	alice.set("max-storage", "5000")
	wantStatus(t, build(alice, req), nixproto.Built)
	if n := bt.runner.count("big"); n != 2 {
		t.Errorf("%d runs, want 2", n)
	}

	// Who waits with him gets it.
	alice.set("max-storage", "500")
	req = big("joined")
	goOn := make(chan struct{})
	bt.runner.act("joined", func(f *fakeRun) error { f.say("begun"); <-goOn; return f.writeContent() })
	answers := make(chan *nixproto.BuildResult, 1)
	s := bt.newSessionWith(alice.Account, nil)
	s.storage = meter
	sink := newFakeSink()
	go func() {
		r, err := bt.Build(t.Context(), s, req, sink)
		if err != nil {
			t.Error(err)
		}
		answers <- r
	}()
	<-sink.grown
	bt.session = bt.newSessionWith(bob.Account, nil)
	_, _, done, _ := joinTest(t, bt, req)
	close(goOn)
	wantStatus(t, <-done, nixproto.Built)
	wantError(t, <-answers, nixproto.MiscFailure, "max-storage")
	if n := bt.runner.count("joined"); n != 1 {
		t.Errorf("%d runs, want 1", n)
	}
}
