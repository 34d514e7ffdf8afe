// Bench compares nbd with a real nix-daemon behind OpenSSH on one machine, in
// one run, and prints the ratios: wall time as a stock client sees it, and CPU
// time of the server.
//
//	go run ./contrib/bench [-quick] [-only REGEXP] [-dir DIR] [-kernel FILE]
//
// It needs root (the peer gets a /nix of its own in a mount namespace), Nix,
// OpenSSH with its server, QEMU, a static busybox, 10 GiB of disk, and a kernel
// for the guests. contrib/debian.sh knows how to get them; `contrib/run-bench`
// does it all.
//
// Server CPU is what the server's process used, up to a second after the client
// has left, and of the peer all that its sshd started, orphans included. What guests use is told apart: under emulation it says nothing.
package main

import (
	"cmp"
	"flag"
	"fmt"
	"log"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"time"
)

func main() {
	log.SetFlags(0)
	if len(os.Args) > 2 && os.Args[1] == adopt {
		log.Fatal("bench: ", runAdopting(os.Args[2:]))
	}
	if len(os.Args) == 4 && os.Args[1] == bareServer {
		log.Fatal("bench: ", serveBare(os.Args[2], os.Args[3]))
	}
	quick := flag.Bool("quick", false, "smaller amounts, fewer rounds: to see that it works")
	only := flag.String("only", "", "only scenarios that match")
	dir := flag.String("dir", filepath.Join(os.TempDir(), "nbd-bench"), "where everything is kept; emptied first")
	kernel := flag.String("kernel", os.Getenv("NBD_TEST_KERNEL"), "kernel package for the guests")
	flag.Parse()
	match, err := regexp.Compile(*only)
	if err != nil {
		log.Fatal(err)
	}
	if err := run(*dir, *kernel, *quick, match); err != nil {
		log.Fatal("bench: ", err)
	}
}

func run(dir, kernel string, quick bool, only *regexp.Regexp) error {
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	b := &bench{dir: dir, small: 2000, big: 1 << 30, graph: 100, rounds: 3, idle: 1000, paths: 100_000}
	if quick {
		b.small, b.big, b.graph, b.rounds, b.idle, b.paths = 200, 64<<20, 5, 1, 100, 1000
	}
	if err := b.prepare(); err != nil {
		return err
	}
	nbd, err := startNBD(dir, kernel)
	if err != nil {
		return err
	}
	defer nbd.stop()
	peer, err := startPeer(dir)
	if err != nil {
		return err
	}
	defer peer.stop()
	fmt.Printf("%-42s %28s %28s %8s %8s\n", "", "nbd: wall, CPU (s)", "peer: wall, CPU (s)", "wall", "CPU")
	for _, s := range b.scenarios() {
		if !only.MatchString(s.name) {
			continue
		}
		if err := b.compare(s, nbd, peer); err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
	}
	for _, v := range []value{{"bare round trips", b.bareRoundTrips}, {"idle connections", b.idleConnections}, {"many paths", b.manyPaths}} {
		if !only.MatchString(v.name) {
			continue
		}
		if err := v.print(nbd); err != nil {
			return fmt.Errorf("%s: %w", v.name, err)
		}
	}
	return nil
}

// A value is measured without the peer.
type value struct {
	name  string
	print func(nbd *machine) error
}

// A figure is what one run of a scenario cost.
type figure struct{ wall, cpu, guests time.Duration }

// compare runs a scenario in turn on both servers and prints the medians.
func (b *bench) compare(s scenario, nbd, peer *machine) error {
	var ours, theirs []figure
	for round := range cmp.Or(s.rounds, b.rounds) {
		order := []*machine{nbd, peer}
		if round%2 == 1 { // the second one finds the client's files in memory
			slices.Reverse(order)
		}
		for _, m := range order {
			f, err := b.measure(s, m, round)
			if err != nil {
				return fmt.Errorf("on %s: %w", m.name, err)
			}
			if m == nbd {
				ours = append(ours, f)
			} else {
				theirs = append(theirs, f)
			}
		}
	}
	o, p := median(ours), median(theirs)
	note := ""
	if o.guests > 0 {
		note = fmt.Sprintf("  guests: %.2f s of CPU", o.guests.Seconds())
	}
	fmt.Printf("%-42s %15.2f %12.2f %15.2f %12.2f %8.2f %8.2f%s\n", s.name,
		o.wall.Seconds(), o.cpu.Seconds(), p.wall.Seconds(), p.cpu.Seconds(),
		ratio(o.wall, p.wall), ratio(o.cpu, p.cpu), note)
	return nil
}

func ratio(a, b time.Duration) float64 { return float64(a) / float64(max(b, time.Millisecond)) }

// median takes the median of each figure by itself.
func median(all []figure) figure {
	mid := func(get func(figure) time.Duration) time.Duration {
		list := make([]time.Duration, len(all))
		for i, f := range all {
			list[i] = get(f)
		}
		slices.SortFunc(list, cmp.Compare)
		return list[len(list)/2]
	}
	return figure{
		mid(func(f figure) time.Duration { return f.wall }),
		mid(func(f figure) time.Duration { return f.cpu }),
		mid(func(f figure) time.Duration { return f.guests }),
	}
}

// measure runs a scenario once. What it prepares is not counted.
func (b *bench) measure(s scenario, m *machine, round int) (figure, error) {
	action, err := s.prepare(b, m, round)
	if err != nil {
		return figure{}, fmt.Errorf("prepare: %w", err)
	}
	before, err := m.cpu()
	if err != nil {
		return figure{}, err
	}
	start := time.Now()
	if err := action(); err != nil {
		return figure{}, err
	}
	wall := time.Since(start)
	after, err := m.cpuWhenIdle()
	if err != nil {
		return figure{}, err
	}
	return figure{wall, after.server - before.server, after.guests - before.guests}, nil
}
