package builtin

import (
	"cmp"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
)

// A pkg is one path that is to appear in a user environment.
type pkg struct {
	path     string
	active   bool
	priority int // the smaller one wins
}

// firstPropagated is the priority of the first package that another one names:
// they come after all others.
const firstPropagated = 1000

// buildEnvironment is builtin:buildenv.
func buildEnvironment(o *Order, log *logger) error {
	out, err := o.out()
	if err != nil {
		return err
	}
	list, err := o.attr("derivations")
	if err != nil {
		return err
	}
	if err := makeDir(out); err != nil {
		return err
	}
	pkgs, err := parsePackages(list)
	if err != nil {
		return err
	}
	e := &environment{log: log, out: out, done: map[string]bool{}, postponed: map[string]bool{}, priority: map[string]int{}}
	if err := e.build(pkgs); err != nil {
		return err
	}
	manifest, err := o.attr("manifest")
	if err != nil {
		return err
	}
	return e.symlink(manifest, filepath.Join(out, "manifest.nix"), 0)
}

// makeDir makes a directory that may be there.
func makeDir(path string) error {
	if err := os.Mkdir(path, 0o777); err != nil && !errors.Is(err, fs.ErrExist) {
		return errorf("creating directory '%s': %s", path, reason(err))
	}
	return nil
}

// parsePackages reads "ACTIVE PRIORITY N PATH…", again and again, with N paths.
func parsePackages(list string) ([]pkg, error) {
	var pkgs []pkg
	words := fields(list)
	for len(words) > 0 {
		if len(words) < 3 {
			return nil, errorf("'derivations' ends after '%s'", words[len(words)-1])
		}
		active := words[0] != "false"
		priority, err := strconv.ParseInt(words[1], 10, 32)
		if err != nil {
			return nil, errorf("'derivations' has the priority '%s'", words[1])
		}
		count, err := strconv.ParseUint(words[2], 10, 31)
		if err != nil {
			return nil, errorf("'derivations' has the number of outputs '%s'", words[2])
		}
		words = words[3:]
		if uint64(len(words)) < count {
			return nil, errorf("'derivations' ends before an output of '%s'", strconv.FormatUint(count, 10))
		}
		for _, path := range words[:count] {
			pkgs = append(pkgs, pkg{path, active, int(priority)})
		}
		words = words[count:]
	}
	return pkgs, nil
}

// An environment is being built at out.
type environment struct {
	log *logger
	out string
	// done are the packages that are in it, postponed those that they name.
	done, postponed map[string]bool
	// priority is that of each symlink made.
	priority map[string]int
}

// build adds the packages, then those that they want to have with them, and so
// on.
func (e *environment) build(pkgs []pkg) error {
	slices.SortStableFunc(pkgs, func(a, b pkg) int {
		return cmp.Or(cmp.Compare(a.priority, b.priority), comparePaths(a.path, b.path))
	})
	for _, p := range pkgs {
		if !p.active {
			continue
		}
		if err := e.add(p.path, p.priority); err != nil {
			return err
		}
	}
	for priority := firstPropagated; len(e.postponed) > 0; {
		var next []string
		for path := range e.postponed {
			next = append(next, path)
		}
		clear(e.postponed)
		slices.SortFunc(next, comparePaths)
		for _, path := range next {
			if err := e.add(path, priority); err != nil {
				return err
			}
			priority++
		}
	}
	return nil
}

// comparePaths orders paths by their components.
func comparePaths(a, b string) int {
	return slices.Compare(strings.Split(a, "/"), strings.Split(b, "/"))
}

// add puts a package into the environment, unless it is there.
func (e *environment) add(path string, priority int) error {
	if e.done[path] {
		return nil
	}
	e.done[path] = true
	if err := e.merge(path, e.out, priority); err != nil {
		return err
	}
	file := filepath.Join(path, "nix-support", "propagated-user-env-packages")
	text, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
		return nil
	}
	if err != nil {
		return errorf("opening file %s: %s", quoted(file), reason(err))
	}
	for _, p := range strings.FieldsFunc(string(text), func(r rune) bool { return r == ' ' || r == '\n' }) {
		if !e.done[p] {
			e.postponed[p] = true
		}
	}
	return nil
}

// merge makes symlinks in the directory dst to all that is in src. It calls
// itself for directories that are in both: as deep as a path may be long, since
// src is a path that was opened.
func (e *environment) merge(src, dst string, priority int) error {
	entries, err := os.ReadDir(src)
	if errors.Is(err, syscall.ENOTDIR) {
		return e.log.warn("not including %s in the user environment because it's not a directory", quoted(src))
	}
	if err != nil {
		return errorf("cannot read directory %s: %s", quoted(src), reason(err))
	}
	for _, entry := range entries {
		if strings.HasPrefix(entry.Name(), ".") {
			continue
		}
		from, to := src+"/"+entry.Name(), dst+"/"+entry.Name()
		info, err := os.Stat(from)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
			if err := e.log.warn("skipping dangling symlink '%s'", to); err != nil {
				return err
			}
			continue
		}
		if err != nil {
			return errorf("getting status of '%s': %s", from, reason(err))
		}
		if isLeftOut(from) {
			continue
		}
		there, err := os.Lstat(to)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			err = e.symlink(from, to, priority)
		case err != nil:
			err = errorf("getting status of '%s': %s", to, reason(err))
		case info.IsDir():
			err = e.directory(from, to, there, priority)
		default:
			err = e.file(from, to, there, priority)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// isLeftOut reports whether a file is of no use in an environment, or there in
// so many packages that it would only collide.
func isLeftOut(path string) bool {
	for _, end := range []string{"/propagated-build-inputs", "/nix-support", "/perllocal.pod",
		"/info/dir", "/log", "/manifest.nix", "/manifest.json"} {
		if strings.HasSuffix(path, end) {
			return true
		}
	}
	return false
}

// directory puts the directory from at the place to, where something is.
func (e *environment) directory(from, to string, there fs.FileInfo, priority int) error {
	if there.IsDir() {
		return e.merge(from, to, priority)
	}
	// What is there is a symlink of ours: a directory takes its place, with
	// what is in both.
	earlier, err := filepath.EvalSymlinks(to)
	if err != nil {
		return errorf("reading symbolic link '%s': %s", to, reason(err))
	}
	if info, err := os.Lstat(earlier); err != nil {
		return errorf("getting status of '%s': %s", earlier, reason(err))
	} else if !info.IsDir() {
		return errorf("collision between %s and non-directory %s", quoted(from), quoted(earlier))
	}
	if err := os.Remove(to); err != nil {
		return errorf("cannot unlink '%s': %s", to, reason(err))
	}
	if err := makeDir(to); err != nil {
		return err
	}
	if err := e.merge(earlier, to, e.priority[to]); err != nil {
		return err
	}
	return e.merge(from, to, priority)
}

// file puts the file from at the place to, if what is there has less priority.
func (e *environment) file(from, to string, there fs.FileInfo, priority int) error {
	if there.IsDir() {
		return errorf("collision between non-directory '%s' and directory '%s'", from, to)
	}
	if e.priority[to] == priority {
		target, err := os.Readlink(to)
		if err != nil {
			return errorf("reading symbolic link '%s': %s", to, reason(err))
		}
		return errorf("Unable to build profile. There is a conflict for the following files:\n\n  %s\n  %s", quoted(target), quoted(from))
	}
	if e.priority[to] < priority {
		return nil
	}
	if err := os.Remove(to); err != nil {
		return errorf("cannot unlink '%s': %s", to, reason(err))
	}
	return e.symlink(from, to, priority)
}

func (e *environment) symlink(target, path string, priority int) error {
	if err := os.Symlink(target, path); err != nil {
		return errorf("creating symlink '%s' -> '%s': %s", path, target, reason(err))
	}
	e.priority[path] = priority
	return nil
}
