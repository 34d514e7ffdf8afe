package server

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"nbd/nixproto"
	"nbd/store"
)

// What an account tries that shares builds with others. In these tests mallory
// is the attacker, and alice is who must not notice.

// A failure of a guest that was given next to no memory is no truth about the
// build for those who have more.
func TestAttackStarvedFailure(t *testing.T) {
	bt := newBuildTest(t, nil)
	alice, mallory := bt.alice(), bt.party("mallory").with("NBD_MAX_MEM", "300")
	starve := func(f *fakeRun) error {
		f.say("run %d", f.try)
		if f.spec.MemoryMiB < 2048 {
			return exit(1) // malloc returned NULL: nobody was killed
		}
		return f.write("out", "good", false)
	}
	bt.runner.act("x", starve)
	req := bt.request(drv("x"))
	r, _ := mallory.build(req)
	wantError(t, r, nixproto.PermanentFailure, "exit code 1")
	r, _ = alice.build(req)
	wantStatus(t, r, nixproto.Built)
	bt.wantRuns(2)

	// The same while it runs.
	open := make(chan bool, 2)
	bt.runner.act("y", func(f *fakeRun) error {
		f.say("begun")
		<-open
		return starve(f)
	})
	y := bt.request(drv("y"))
	_, first, _ := mallory.start(y)
	_, second, _ := alice.start(y)
	open <- true
	open <- true
	wantStatus(t, <-first, nixproto.PermanentFailure)
	wantStatus(t, <-second, nixproto.Built)
	if got := alice.out(y); got != "good" {
		t.Errorf("alice has %q", got)
	}

	// Who has as little is answered by it.
	bt.runner.act("z", starve)
	z := bt.request(drv("z"))
	mallory.build(z)
	mallory.build(z)
	if n := bt.runner.count("z"); n != 1 {
		t.Errorf("%d runs", n)
	}
}

// Who builds first, shares, and then does not, keeps others from sharing no
// longer than until one of them has built.
func TestAttackSquattedResult(t *testing.T) {
	bt := newBuildTest(t, nil)
	alice, bob, mallory := bt.alice(), bt.party("bob"), bt.party("mallory")
	req := random(bt)
	mallory.build(req)
	mallory.set("share-results", "false")
	alice.build(req)
	bt.wantRuns(2)
	if got := alice.out(req); got != "run 2" {
		t.Errorf("alice has %q", got)
	}
	if why := fmt.Sprint(alice.requests()[0].Decisions); !strings.Contains(why, "none is stored under the key") {
		t.Errorf("alice is told of what she must not know: %s", why)
	}
	bob.build(req)
	bt.wantRuns(2)
	if got := bob.out(req); got != "run 2" {
		t.Errorf("bob has %q", got)
	}
}

// The ends of an account that did not share are not shared when it is removed.
func TestAttackRemovedAccountsResults(t *testing.T) {
	bt := newBuildTest(t, nil)
	alice, carol := bt.alice(), bt.party("carol")
	req := failing(bt, exit(3))
	carol.build(req)
	carol.set("share-results", "false")
	if err := bt.st.RemoveAccount(t.Context(), carol.ID); err != nil {
		t.Fatal(err)
	}
	r, sink := alice.build(req)
	wantError(t, r, nixproto.PermanentFailure, "marker 2")
	if strings.Contains(sink.log(req.DrvPath), "marker 1") {
		t.Errorf("alice sees carol's log %q", sink.log(req.DrvPath))
	}
	if _, err := bt.st.AddAccount(t.Context(), "carol"); !errors.Is(err, store.ErrExists) {
		t.Errorf("the name is used again: %v", err)
	}
}

// What another one called the derivation that he built first says nothing to
// who starts the same build again.
func TestAttackRecipe(t *testing.T) {
	bt := newBuildTest(t, nil)
	alice, mallory := bt.alice(), bt.party("mallory")
	d := floatingDrv("x")
	req := bt.request(d)
	// As if a derivation with other inputs had come to be the same one.
	forged := nixproto.SumSHA256([]byte("curl"))
	s := bt.newSession(mallory.Account)
	set, err := bt.policy(s, d, Limits{})
	if err != nil {
		t.Fatal(err)
	}
	own, err := nixproto.NewModulo(nil).RealisationHash(d)
	if err != nil {
		t.Fatal(err)
	}
	sink := newFakeSink()
	_, err = bt.Builds.build(t.Context(), s, &job{account: mallory.ID, drvPath: req.DrvPath, drv: d, set: set, hash: forged, resolved: own}, sink)
	if err != nil {
		t.Fatal(err)
	}
	alice.build(req)
	alice2 := bt.newSession(alice.Account)
	if _, err := bt.Restart(t.Context(), alice2, alice.requests()[0].ID); err != nil {
		t.Fatal(err)
	}
	bt.kept.Wait()
	if real, err := bt.st.Realisation(t.Context(), alice.ID, forged, "out"); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("alice's view says that %v is the output of what she never asked for: %v", real, err)
	}
}

// A .drv file that lies about its outputs is no input for a key without
// store:write: what is built with it would be another thing at a good path.
func TestAttackLyingInputDerivation(t *testing.T) {
	bt := newBuildTest(t, nil)
	honest := drv("dep")
	honestPath := bt.addDrv(honest)
	user := drv("user")
	bt.dependsOn(user, honestPath, "out")
	bt.settlePaths(user)

	planted := bt.add("dep", "planted")
	lying := drv("dep")
	bt.settlePaths(lying)
	lying.Outputs["out"] = nixproto.DerivationOutput{Path: planted}
	lying.Env["out"] = string(planted)
	reg := bt.text("dep.drv", string(lying.ATerm()), nil)
	bt.unstored = append(bt.unstored, reg)
	forged := drv("user")
	forged.InputDrvs = map[nixproto.StorePath][]string{reg.Info.Path: {"out"}}
	forged.Env, forged.Outputs = user.Env, user.Outputs
	text := bt.text("user.drv", string(forged.ATerm()), forged.References())
	bt.unstored = append(bt.unstored, text)

	c := *bt.session.Client
	c.Permissions = []string{string(BuildWrite), string(StoreRead)}
	bt.session.Client = &c
	rs, _ := bt.paths(nixproto.BuildNormal, nixproto.DerivedPath{Path: text.Info.Path, Outputs: []string{"out"}})
	wantError(t, &rs[0].BuildResult, nixproto.InputRejected, "output")
	if n := bt.runner.count("user"); n != 0 {
		t.Errorf("%d runs", n)
	}
	if valid, err := bt.st.Valid(t.Context(), bt.account.ID, staticOutputs(user)); err != nil || len(valid) != 0 {
		t.Errorf("the account vouches for %v, %v", valid, err)
	}
}

// Builds that go on without a client are bounded, and so are restarts.
func TestAttackDetachedBuilds(t *testing.T) {
	bt := newBuildTest(t, nil)
	bt.maxKept = 3
	mallory := bt.party("mallory").with("NBD_KEEP_BUILDS_RUNNING", "1", "NBD_REUSE_RESULTS", "none")
	hold := make(chan bool)
	bt.runner.act("x", func(f *fakeRun) error {
		f.say("begun")
		select {
		case <-hold:
		case <-f.ctx.Done():
		}
		return f.write("out", "x", false)
	})
	req := bt.request(drv("x"))
	for range 3 {
		leave, done, _ := mallory.start(req)
		leave()
		<-done
	}
	r, _ := mallory.build(req)
	wantError(t, r, nixproto.MiscFailure, "keep-builds-running")
	if n := len(bt.liveOf(mallory.ID)); n != 3 {
		t.Errorf("%d builds are under way", n)
	}
	// Others are not concerned.
	r, _ = bt.alice().with("NBD_KEEP_BUILDS_RUNNING", "1").build(bt.request(drv("y")))
	wantStatus(t, r, nixproto.Built)
	close(hold)
}

// A guest that is made to break is not started for ever.
func TestAttackEndlessRestarts(t *testing.T) {
	bt := newBuildTest(t, nil)
	mallory := bt.party("mallory").with("NBD_MAX_BUILD_RESTARTS", "1000000000")
	bt.runner.act("x", func(*fakeRun) error { return errors.New("the guest panicked") })
	r, _ := mallory.build(bt.request(drv("x")))
	wantStatus(t, r, nixproto.TransientFailure)
	if n := bt.runner.count("x"); n > 1+mostRestarts {
		t.Errorf("%d runs", n)
	}
}

// A key is of contents: names, claimed paths and squatted outputs make no build
// equal to another.
func TestAttackForgedInputs(t *testing.T) {
	bt := newBuildTest(t, nil)
	alice, mallory := bt.alice(), bt.party("mallory")
	good, bad := builtPath(t, "lib", "good"), builtPath(t, "lib", "bad")
	bad.Path = good.Path // the same path with other bytes
	register := func(p *party, tp testPath) {
		t.Helper()
		up, err := bt.st.NewUpload(t.Context(), p.ID, store.UploadOptions{})
		if err != nil {
			t.Fatal(err)
		}
		defer up.Abort()
		info := tp.PathInfo
		if err := errors.Join(up.Add(&info, strings.NewReader(string(tp.nar))), up.Commit()); err != nil {
			t.Fatal(err)
		}
	}
	register(alice, good)
	register(mallory, bad)
	d := drv("x")
	d.InputSrcs = []nixproto.StorePath{good.Path}
	bt.runner.act("x", func(f *fakeRun) error { return f.write("out", fmt.Sprint("from ", f.spec.Inputs[0].NarHash), false) })
	req := bt.request(d)
	mallory.build(req)
	alice.build(req)
	bt.wantRuns(2)
	if got := alice.out(req); got != fmt.Sprint("from ", good.NarHash) {
		t.Errorf("alice has %q", got)
	}

	// Without the bytes there is neither a build nor a hint that there was one.
	eve := bt.party("eve")
	r, sink := eve.build(req)
	wantError(t, r, nixproto.MiscFailure, "not valid in your store", string(good.Path))
	if len(sink.logs) != 0 || len(eve.requests()[0].Key) != 0 {
		t.Errorf("eve sees %q and the key %q", sink.logs, eve.requests()[0].Key)
	}

	// Another builder for the same output path is another build.
	squat := *d
	squat.Builder = "/bin/evil"
	register(eve, good)
	r, _ = eve.build(&BuildRequest{DrvPath: req.DrvPath, Drv: &squat})
	wantStatus(t, r, nixproto.Built)
	bt.wantRuns(3)
	bob := bt.party("bob")
	register(bob, good)
	bob.build(req)
	bt.wantRuns(3)
	if got := bob.requests()[0]; !got.Reused || bob.out(req) != alice.out(req) {
		t.Errorf("bob has %q, by %+v", bob.out(req), got)
	}
}

// Nobody ends for others what they wait for too.
func TestAttackSharedRun(t *testing.T) {
	bt := newBuildTest(t, nil)
	alice, mallory := bt.alice(), bt.party("mallory")
	req, open := gated(bt)
	// Mallory starts it, with limits that are over at once.
	_, first, _ := mallory.with("NBD_TIMEOUT", "1").start(req)
	_, second, _ := alice.start(req)
	wantError(t, <-first, nixproto.TimedOut, "timed out after 1 seconds")
	// He joins, and cancels, and leaves, and restarts.
	_, third, _ := mallory.start(req)
	for _, id := range bt.liveOf(alice.ID) {
		if err := bt.Cancel(t.Context(), mallory.ID, id, ""); !errors.Is(err, store.ErrNotFound) {
			t.Errorf("mallory cancels alice's: %v", err)
		}
		if _, err := bt.Follow(t.Context(), mallory.ID, id); !errors.Is(err, store.ErrNotFound) {
			t.Errorf("mallory follows alice's: %v", err)
		}
		if _, err := bt.Restart(context.Background(), bt.newSession(mallory.Account), id); !errors.Is(err, store.ErrNotFound) {
			t.Errorf("mallory restarts alice's: %v", err)
		}
	}
	for _, id := range bt.liveOf(mallory.ID) {
		if err := bt.Cancel(t.Context(), mallory.ID, id, ""); err != nil {
			t.Error(err)
		}
	}
	<-third
	leave, fourth, _ := mallory.start(req)
	leave()
	<-fourth
	open <- nil
	wantStatus(t, <-second, nixproto.Built)
	bt.wantRuns(1)
	if got := alice.out(req); got != "run 1" {
		t.Errorf("alice has %q", got)
	}
	for _, rec := range mallory.requests() {
		if len(rec.Outputs) != 0 {
			t.Errorf("mallory's record has outputs: %+v", rec)
		}
	}
}

// Who joins and wants a broken guest started again and again makes nobody wait
// for that.
func TestAttackRestartsOfOthers(t *testing.T) {
	bt := newBuildTest(t, nil)
	alice, mallory := bt.alice().with("NBD_MAX_BUILD_RESTARTS", "1"), bt.party("mallory").with("NBD_MAX_BUILD_RESTARTS", "3")
	req, open := gated(bt)
	_, first, sink := alice.start(req)
	_, second, _ := mallory.start(req)
	broken := errors.New("the guest panicked")
	open <- broken
	open <- broken
	wantStatus(t, <-first, nixproto.TransientFailure)
	open <- nil
	wantStatus(t, <-second, nixproto.Built)
	bt.wantRuns(3)
	if n := strings.Count(fmt.Sprint(sink.notes), "trying again"); n != 1 {
		t.Errorf("alice was told %q", sink.notes)
	}
	runs := alice.runs()
	if len(runs) != 2 || runs[0].Status != store.StatusInternalError || runs[1].Status != store.StatusInternalError {
		t.Errorf("alice's runs: %+v", runs)
	}
}

// The builds of an account that is removed end, with or without a client.
func TestAttackBuildsOfRemovedAccount(t *testing.T) {
	bt := newBuildTest(t, nil)
	alice, mallory := bt.alice(), bt.party("mallory").with("NBD_KEEP_BUILDS_RUNNING", "1")
	req, open := gated(bt)
	leave, first, _ := mallory.start(req)
	leave()
	<-first
	_, second, _ := alice.start(req)
	if err := bt.st.RemoveAccount(t.Context(), mallory.ID); err != nil {
		t.Fatal(err)
	}
	bt.CancelAll(mallory.ID, "the operator")
	bt.kept.Wait()
	if n := len(bt.liveOf(mallory.ID)); n != 0 {
		t.Errorf("%d builds go on", n)
	}
	open <- nil
	wantStatus(t, <-second, nixproto.Built)
	bt.wantRuns(1)
	if got := alice.out(req); got != "run 1" {
		t.Errorf("alice has %q", got)
	}
}

// Who joins with a wish for many CPUs does not make others pay for them.
func TestAttackCostsOfOthers(t *testing.T) {
	bt := newBuildTest(t, func(c *BuildsConfig) { c.Room.Guests = 1 })
	alice, mallory := bt.alice(), bt.party("mallory").with("NBD_MIN_CPU", "500")
	hold := make(chan bool)
	bt.runner.act("busy", func(f *fakeRun) error { f.say("begun"); <-hold; return exit(1) })
	_, busy, _ := alice.start(bt.request(drv("busy")))
	req := bt.request(drv("x"))
	var done []chan *nixproto.BuildResult
	for i, p := range []*party{alice, mallory} {
		s := bt.newSessionWith(p.Account, p.env)
		c := make(chan *nixproto.BuildResult, 1)
		done = append(done, c)
		go func() {
			r, err := bt.Build(t.Context(), s, req, newFakeSink())
			if err != nil {
				t.Error(err)
			}
			c <- r
		}()
		for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) { // no event tells that it waits
			if n := len(bt.Queue()); n == i+1 {
				break
			} else if time.Now().After(deadline) {
				t.Fatalf("%d requests wait", n)
			}
		}
	}
	close(hold)
	<-busy
	for _, c := range done {
		wantStatus(t, <-c, nixproto.Built)
	}
	runs := alice.runs()
	rec := runs[len(runs)-1]
	if want := cpuSeconds(rec.Started, rec.Stopped, 2); rec.CPUs != 500 || rec.CPUSeconds != want || rec.LimitSeconds != want {
		t.Errorf("%d CPUs, alice pays %d, counts %d, want %d", rec.CPUs, rec.CPUSeconds, rec.LimitSeconds, want)
	}
}
