package store_test

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"nbd/nixproto"
	"nbd/store"
	"nbd/store/storetest"
)

// crashDir tells the test binary that it is the child of TestCrash, and which
// directory to fill.
const crashDir = "NBD_TEST_CRASH_DIR"

func TestMain(m *testing.M) {
	if dir := os.Getenv(crashDir); dir != "" {
		if err := crashChild(dir, os.Getenv(crashDir+"_ROUND")); err != nil {
			fmt.Println("error", err)
			os.Exit(1)
		}
	}
	os.Exit(m.Run())
}

// crashChild uploads, registers, deletes and sweeps without end, and prints
// what is acknowledged.
func crashChild(dir, round string) error {
	s, err := store.Open(dir, store.Config{})
	if err != nil {
		return err
	}
	a, err := s.AccountByName(ctx, "alice")
	if errors.Is(err, store.ErrNotFound) {
		a, err = s.AddAccount(ctx, "alice")
	}
	if err != nil {
		return err
	}
	bob, err := s.AccountByName(ctx, "bob")
	if errors.Is(err, store.ErrNotFound) {
		bob, err = s.AddAccount(ctx, "bob")
	}
	if err != nil {
		return err
	}
	var wg sync.WaitGroup
	errs := make(chan error, 5)
	for worker := range 3 {
		wg.Go(func() { errs <- crashUploads(s, a.ID, fmt.Sprintf("%s-%d", round, worker)) })
	}
	wg.Go(func() { errs <- crashDeletes(s, a.ID, round) })
	wg.Go(func() { errs <- crashBorrows(s, a.ID, bob.ID, round) })
	err = <-errs
	wg.Wait()
	return err
}

// crashUploads uploads bursts of small and large paths.
func crashUploads(s *store.Store, a store.AccountID, name string) error {
	for burst := 0; ; burst++ {
		u, err := s.NewUpload(ctx, a, store.UploadOptions{})
		if err != nil {
			return err
		}
		var said strings.Builder
		var last []nixproto.StorePath
		for i := range 1 + burst%7 {
			size := 100
			if burst%5 == 0 && i == 0 {
				size = 300 << 10
			}
			nar := storetest.File(fmt.Sprintf("%s %d %d %*d", name, burst, i, size, 0), false)
			info := storetest.Source("crash", nar, last...)
			if err := u.Add(info, bytes.NewReader(nar)); err != nil {
				return err
			}
			last = []nixproto.StorePath{info.Path}
			fmt.Fprintf(&said, "have %s\n", info.Path)
		}
		if err := u.Commit(); err != nil {
			return err
		}
		fmt.Print(said.String())
	}
}

// crashBorrows lets alice upload a path with a dependency, bob one that refers
// to it, which adopts both, and alice delete hers again.
func crashBorrows(s *store.Store, alice, bob store.AccountID, round string) error {
	upload := func(v *store.Sight, content string, refs ...nixproto.StorePath) (nixproto.StorePath, error) {
		u, err := v.NewUpload(ctx, store.UploadOptions{})
		if err != nil {
			return "", err
		}
		defer u.Abort()
		nar := storetest.File(content, false)
		info := storetest.Source("lent", nar, refs...)
		if err := u.Add(info, bytes.NewReader(nar)); err != nil {
			return "", err
		}
		return info.Path, u.Commit()
	}
	for i := 0; ; i++ {
		own := s.NewSight(alice, store.Trust{})
		borrowing := s.NewSight(bob, store.Trust{Linked: []store.AccountID{alice}})
		name := fmt.Sprintf("%s %d %*d", round, i, 70000*(i%2), 0)
		dep, err := upload(own, "dep "+name)
		if err != nil {
			return err
		}
		lent, err := upload(own, "lent "+name, dep)
		if err != nil {
			return err
		}
		mine, err := upload(borrowing, "mine "+name, lent)
		if err != nil {
			return err
		}
		fmt.Printf("adopted %s\nadopted %s\nadopted %s\n", mine, lent, dep)
		if _, err := s.Delete(ctx, alice, lent, dep); err != nil {
			return err
		}
	}
}

// crashDeletes registers a path that was staged, deletes it, and sweeps.
func crashDeletes(s *store.Store, a store.AccountID, round string) error {
	for i := 0; ; i++ {
		st, err := s.Stage(ctx, a)
		if err != nil {
			return err
		}
		nar := storetest.File(fmt.Sprintf("%s %d %*d", round, i, 70000*(i%2), 0), false)
		if _, err := st.Write(nar); err != nil {
			return err
		}
		if err := st.Finish(); err != nil {
			return err
		}
		info := storetest.Source("gone", nar)
		if err := s.Register(ctx, a, []store.Registration{{Info: *info, Staged: st}}); err != nil {
			return err
		}
		fmt.Printf("have %s\n", info.Path)
		fmt.Printf("dropping %s\n", info.Path)
		if _, err := s.Delete(ctx, a, info.Path); err != nil {
			return err
		}
		fmt.Printf("gone %s\n", info.Path)
		if i%3 == 0 {
			if _, err := s.Sweep(ctx); err != nil {
				return err
			}
		}
	}
}

// TestCrash kills a process that fills a store at random moments. All that it
// was told is there has to be there, and nothing else has to be wrong.
func TestCrash(t *testing.T) {
	dir := t.TempDir()
	rounds := 6
	if testing.Short() {
		rounds = 2
	}
	state := make(map[nixproto.StorePath]string)
	for round := range rounds {
		crashRound(t, dir, round, state)
		s, err := store.Open(dir, store.Config{})
		if err != nil {
			t.Fatal(err)
		}
		a, err := s.AccountByName(ctx, "alice")
		if err != nil {
			t.Fatal(err)
		}
		bob, err := s.AccountByName(ctx, "bob")
		if err != nil {
			t.Fatal(err)
		}
		have := 0
		for p, want := range state {
			if want == "adopted" {
				if _, err := s.Info(ctx, bob.ID, p); err != nil {
					t.Errorf("round %d: %s was acknowledged as %s: %v", round, p, want, err)
				}
				continue
			}
			_, err := s.Info(ctx, a.ID, p)
			if want == "have" && err != nil || want == "gone" && !errors.Is(err, store.ErrNotFound) {
				t.Errorf("round %d: %s was acknowledged as %s: %v", round, p, want, err)
			}
			if want == "have" {
				have++
			}
		}
		t.Logf("round %d: %d paths", round, have)
		storetest.Check(t, s)
		if left := files(t, dir+"/tmp"); len(left) > 0 {
			t.Errorf("left in tmp: %q", left)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// crashRound runs the child for a moment, and notes what it says of each path.
func crashRound(t *testing.T, dir string, round int, state map[nixproto.StorePath]string) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), crashDir+"="+dir, fmt.Sprintf("%s_ROUND=%d", crashDir, round))
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	kill := time.AfterFunc(time.Duration(200+rand.IntN(1200))*time.Millisecond, func() { cmd.Process.Kill() })
	defer kill.Stop()
	r := bufio.NewReader(out)
	for {
		line, err := r.ReadString('\n')
		if err == io.EOF { // what has no newline was not said
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		what, p, _ := strings.Cut(strings.TrimSpace(line), " ")
		if what == "error" {
			t.Errorf("child: %s", p)
		}
		state[nixproto.StorePath(p)] = what
	}
	_ = cmd.Wait() // it was killed
}
