package server

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"nbd/nixproto"
	"nbd/store"
)

// gated is an act that waits after its first line of log until it is opened.
func gated(bt *buildTest) (req *BuildRequest, open chan error) {
	open = make(chan error, 10)
	bt.runner.act("x", func(f *fakeRun) error {
		f.say("run %d", f.try)
		select {
		case err := <-open:
			if err != nil {
				return err
			}
		case <-f.ctx.Done():
			return f.ctx.Err()
		}
		return f.write("out", fmt.Sprint("run ", f.try), false)
	})
	return bt.request(drv("x")), open
}

func TestJoinAcrossAccounts(t *testing.T) {
	bt := newBuildTest(t, nil)
	alice, bob := bt.alice(), bt.party("bob")
	req, open := gated(bt)
	_, first, _ := alice.start(req)
	_, second, sink := bob.start(req)
	_, third, own := alice.start(req)
	open <- nil
	for _, done := range []chan *nixproto.BuildResult{first, second, third} {
		wantStatus(t, <-done, nixproto.Built)
	}
	bt.wantRuns(1)
	if alice.out(req) != "run 1" || bob.out(req) != "run 1" || sink.log(req.DrvPath) != "run 1\n" {
		t.Errorf("outputs %q, %q, log %q", alice.out(req), bob.out(req), sink.log(req.DrvPath))
	}
	if got := fmt.Sprint(sink.notes); !strings.Contains(got, "waiting for an identical build") {
		t.Errorf("bob's notes %q", got)
	}
	if got := fmt.Sprint(own.notes); !strings.Contains(got, fmt.Sprintf("waiting for build %d", alice.runs()[0].ID)) {
		t.Errorf("alice's notes %q", got)
	}
	recs := bob.requests()
	if len(recs) != 1 || !recs[0].Reused || recs[0].ReusedFrom != 0 || recs[0].Status != store.StatusBuilt || !strings.HasPrefix(decided(recs[0]), "running: an identical build") {
		t.Errorf("bob's record %+v", recs)
	}
	if recs := alice.requests(); len(recs) != 2 || recs[1].ReusedFrom != recs[0].ID {
		t.Errorf("alice's records %+v", recs)
	}
}

func TestJoinedFailureIsEverybodys(t *testing.T) {
	bt := newBuildTest(t, nil)
	req, open := gated(bt)
	_, first, a := bt.alice().start(req)
	_, second, b := bt.party("bob").start(req)
	open <- exit(4)
	wantError(t, <-first, nixproto.PermanentFailure, "exit code 4")
	wantError(t, <-second, nixproto.PermanentFailure, "exit code 4")
	bt.wantRuns(1)
	if a.log(req.DrvPath) != b.log(req.DrvPath) || b.log(req.DrvPath) != "run 1\n" {
		t.Errorf("logs %q, %q", a.log(req.DrvPath), b.log(req.DrvPath))
	}
}

func TestJoinedTransientEndRunsOnceMore(t *testing.T) {
	bt := newBuildTest(t, nil)
	alice, bob := bt.alice(), bt.party("bob")
	req, open := gated(bt)
	_, first, _ := alice.start(req)
	_, second, _ := bob.start(req)
	open <- errors.New("the guest was killed")
	open <- nil
	wantStatus(t, <-first, nixproto.Built)
	wantStatus(t, <-second, nixproto.Built)
	bt.wantRuns(2)
	runs := alice.runs()
	if len(runs) != 2 || runs[0].Status != store.StatusInternalError || runs[0].RestartedAs != runs[1].ID || runs[0].CPUSeconds != 0 || len(bob.runs()) != 0 {
		t.Errorf("alice's runs %+v, bob's %+v", runs, bob.runs())
	}
}

// The one who started a run leaves: it goes on, and is that of who stays.
func TestJoinedRunIsHandedOver(t *testing.T) {
	bt := newBuildTest(t, nil)
	alice, bob, carol := bt.alice(), bt.party("bob"), bt.party("carol")
	req, open := gated(bt)
	leave, first, _ := alice.start(req)
	leaveBob, second, _ := bob.start(req)
	_, third, _ := carol.start(req)
	leave()
	<-first
	leaveBob()
	<-second
	open <- nil
	wantStatus(t, <-third, nixproto.Built)
	bt.wantRuns(1)
	if carol.out(req) != "run 1" {
		t.Errorf("carol has %q", carol.out(req))
	}
	for p, want := range map[*party]string{alice: store.StatusClientDisconnect, bob: store.StatusClientDisconnect, carol: store.StatusBuilt} {
		runs := p.runs()
		if len(runs) != 1 || runs[0].Status != want {
			t.Errorf("%s's runs %+v", p.Name, runs)
			continue
		}
		if left := want != store.StatusBuilt; left && (runs[0].CPUSeconds != 0 || runs[0].LimitSeconds < 1) || !left && runs[0].CPUSeconds < 1 {
			t.Errorf("%s pays %d, counts %d", p.Name, runs[0].CPUSeconds, runs[0].LimitSeconds)
		}
	}
	if valid, err := bt.st.Valid(t.Context(), alice.ID, staticOutputs(req.Drv)); err != nil || len(valid) != 0 {
		t.Errorf("who left has %v, %v", valid, err)
	}
}

// liveOf returns the requests of an account that are not answered.
func (bt *buildTest) liveOf(a store.AccountID) (ids []store.BuildID) {
	bt.live.mu.Lock()
	defer bt.live.mu.Unlock()
	for id, r := range bt.live.m {
		if r.job.account == a {
			ids = append(ids, id)
		}
	}
	return ids
}

func TestCancel(t *testing.T) {
	bt := newBuildTest(t, nil)
	alice, bob := bt.alice(), bt.party("bob")
	req, open := gated(bt)
	_, first, _ := alice.start(req)
	_, second, _ := bob.start(req)
	ids := bt.liveOf(alice.ID)
	if len(ids) != 1 {
		t.Fatalf("live %v", ids)
	}
	if err := bt.Cancel(t.Context(), bob.ID, ids[0], ""); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("bob cancels alice's: %v", err)
	}
	if err := bt.Cancel(t.Context(), alice.ID, ids[0], "alice"); err != nil {
		t.Fatal(err)
	}
	wantError(t, <-first, nixproto.MiscFailure, "was cancelled by alice")
	open <- nil
	wantStatus(t, <-second, nixproto.Built)
	if rec := alice.runs()[0]; rec.Status != store.StatusCancelled || rec.CPUSeconds != 0 || rec.LimitSeconds < 1 {
		t.Errorf("record %+v", rec)
	}
	if err := bt.Cancel(t.Context(), alice.ID, ids[0], ""); !errors.Is(err, store.ErrInvalid) {
		t.Errorf("cancel what has ended: %v", err)
	}
	// The last one ends the run.
	bt2 := newBuildTest(t, nil)
	req, _ = gated(bt2)
	_, done, _ := bt2.alice().start(req)
	for _, id := range bt2.liveOf(bt2.account.ID) {
		if err := bt2.Cancel(t.Context(), bt2.account.ID, id, ""); err != nil {
			t.Fatal(err)
		}
	}
	if rec := bt2.alice().runs()[0]; rec.Status != store.StatusCancelled {
		t.Errorf("record when Cancel returned: %+v", rec)
	}
	wantError(t, <-done, nixproto.MiscFailure, "was cancelled")
}

// Who is told that a limit ended a build finds it ended.
func TestLimitIsToldWhenTheRunHasEnded(t *testing.T) {
	bt := newBuildTest(t, nil)
	bt.runner.act("x", func(f *fakeRun) error {
		f.say("go")
		<-f.ctx.Done()
		time.Sleep(100 * time.Millisecond) // a guest takes its time to end
		return f.ctx.Err()
	})
	req := bt.request(drv("x"))
	req.Limits.Timeout = time.Second
	_, done, _ := bt.alice().start(req)
	wantError(t, <-done, nixproto.TimedOut, "timed out")
	if rec := bt.alice().runs()[0]; rec.Status != store.StatusTimeout {
		t.Errorf("record %+v", rec)
	}
}

func TestKeepBuildsRunning(t *testing.T) {
	bt := newBuildTest(t, nil)
	alice := bt.alice().with("NIXBUILDNET_KEEP_BUILDS_RUNNING", "true")
	req, open := gated(bt)
	leave, done, _ := alice.start(req)
	bt.session.leases.Release()
	leave()
	<-done
	follow, err := bt.Follow(t.Context(), alice.ID, 1)
	if err != nil {
		t.Fatal(err)
	}
	open <- nil
	if text, err := io.ReadAll(follow); string(text) != "run 1\n" || err != nil {
		t.Errorf("log %q, %v", text, err)
	}
	if err := bt.Drain(t.Context()); err != nil {
		t.Fatal(err)
	}
	if rec := alice.runs()[0]; rec.Status != store.StatusBuilt {
		t.Errorf("record %+v", rec)
	}
	if alice.out(req) != "run 1" {
		t.Errorf("alice has %q", alice.out(req))
	}
}

// Who keeps a build running has its limits kept, too.
func TestKeptBuildHasLimits(t *testing.T) {
	bt := newBuildTest(t, nil)
	alice := bt.alice().with("NBD_KEEP_BUILDS_RUNNING", "true", "NBD_TIMEOUT", "1")
	req, _ := gated(bt)
	leave, done, _ := alice.start(req)
	leave()
	<-done
	if err := bt.Drain(t.Context()); err != nil {
		t.Fatal(err)
	}
	if rec := alice.runs()[0]; rec.Status != store.StatusTimeout {
		t.Errorf("record %+v", rec)
	}
}

func TestRestart(t *testing.T) {
	bt := newBuildTest(t, nil)
	alice, bob := bt.alice(), bt.party("bob")
	req := failing(bt, exit(1))
	alice.build(req)
	old := alice.runs()[0]
	if _, err := bt.Restart(t.Context(), bt.newSession(bob.Account), old.ID); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("bob restarts alice's: %v", err)
	}
	bt.runner.act("x", nil)
	s := bt.newSession(alice.Account)
	id, err := bt.Restart(t.Context(), s, old.ID)
	if err != nil {
		t.Fatal(err)
	}
	s.leases.Release()
	bt.kept.Wait()
	runs := alice.runs()
	if len(runs) != 2 || runs[1].ID != id || runs[1].Status != store.StatusBuilt || runs[1].RestartOf != old.ID || runs[0].RestartedAs != id {
		t.Errorf("runs %+v", runs)
	}
	if alice.out(req) != "x" {
		t.Errorf("alice has %q", alice.out(req))
	}
}

func TestLimitsOfAccounts(t *testing.T) {
	bt := newBuildTest(t, nil)
	alice, bob := bt.alice(), bt.party("bob")
	alice.set("max-cpu-hours-per-month", "0")
	req, open := gated(bt)
	r, _ := alice.build(req)
	wantError(t, r, nixproto.MiscFailure, "max-cpu-hours-per-month")
	if rec := alice.requests()[0]; rec.Status != store.StatusClientError || len(alice.runs()) != 0 {
		t.Errorf("record %+v", rec)
	}
	// What another one runs may be joined, and reused.
	_, first, _ := bob.start(req)
	_, second, _ := alice.start(req)
	open <- nil
	wantStatus(t, <-first, nixproto.Built)
	wantStatus(t, <-second, nixproto.Built)
	alice.set("max-cpu-hours-per-month", "1000")
	bt.runner.act("y", nil)
	r, _ = alice.build(bt.request(drv("y")))
	wantStatus(t, r, nixproto.Built)

	bob.set("max-running-builds", "1")
	bt.runner.act("z", func(f *fakeRun) error { f.say("begun"); return <-open })
	_, third, _ := bob.start(bt.request(drv("z")))
	r, _ = bob.build(bt.request(drv("w")))
	wantError(t, r, nixproto.MiscFailure, "max-running-builds")
	open <- exit(1)
	wantStatus(t, <-third, nixproto.PermanentFailure)
	r, _ = bob.build(bt.request(drv("w")))
	wantStatus(t, r, nixproto.Built)
}
