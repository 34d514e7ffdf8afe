// Command sibling is a builder that tells all it sees that should be different in
// each guest. It is started twice: the sandbox turns off random addresses, as
// Nix's does, and only the second process has them.
package main

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"hash/maphash"
	"io"
	mathrand "math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

func main() {
	if len(os.Args) == 1 {
		if _, _, errno := unix.Syscall(unix.SYS_PERSONALITY, 0, 0, 0); errno != 0 {
			fmt.Println("personality:", errno)
			os.Exit(1)
		}
		err := syscall.Exec("/proc/self/exe", []string{os.Args[0], "again"}, os.Environ())
		fmt.Println("exec:", err)
		os.Exit(1)
	}
	fmt.Println("time", time.Now().UnixNano())
	for name, value := range all() {
		fmt.Println(name, value)
	}
	if err := os.WriteFile(os.Getenv("out"), nil, 0o644); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
}

func all() map[string]string {
	sees := map[string]string{}
	fail := func(err error) {
		if err != nil {
			fmt.Println("failed:", err)
			os.Exit(1)
		}
	}
	b := make([]byte, 16)
	_, err := unix.Getrandom(b, 0)
	fail(err)
	sees["getrandom"] = hex.EncodeToString(b)
	_, err = rand.Read(b)
	fail(err)
	sees["crypto/rand"] = hex.EncodeToString(b)
	for _, dev := range []string{"/dev/urandom", "/dev/random"} {
		f, err := os.Open(dev)
		fail(err)
		_, err = io.ReadFull(f, b)
		fail(err)
		sees[dev] = hex.EncodeToString(b)
	}
	for _, name := range []string{"uuid", "boot_id"} {
		text, err := os.ReadFile("/proc/sys/kernel/random/" + name)
		fail(err)
		sees[name] = strings.TrimSpace(string(text))
	}
	// What Go's own maps, and its generator that needs no seed, begin with.
	sees["map-seed"] = fmt.Sprint(maphash.String(maphash.MakeSeed(), "x"))
	sees["math/rand"] = fmt.Sprint(mathrand.Uint64())
	auxv, err := auxiliary()
	fail(err)
	// The 16 bytes that C libraries make stack protectors and pointer guards of.
	mem, err := os.Open("/proc/self/mem")
	fail(err)
	_, err = mem.ReadAt(b, int64(auxv[25])) // AT_RANDOM
	fail(err)
	sees["AT_RANDOM"] = hex.EncodeToString(b)
	sees["vdso-address"] = fmt.Sprintf("%#x", auxv[33]) // AT_SYSINFO_EHDR
	sees["stack-address"] = fmt.Sprintf("%#x", auxv[25])
	out, err := exec.Command("/bin/sh", "-c", "mktemp /build/XXXXXXXXXX; mktemp -d /tmp/XXXXXXXXXX").Output()
	fail(err)
	for i, name := range strings.Fields(string(out)) {
		sees[fmt.Sprint("mktemp-", i)] = name
	}
	return sees
}

// auxiliary reads the auxiliary vector (getauxval(3)) of this process.
func auxiliary() (map[uint64]uint64, error) {
	raw, err := os.ReadFile("/proc/self/auxv")
	if err != nil {
		return nil, err
	}
	auxv := map[uint64]uint64{}
	r := bytes.NewReader(raw)
	for {
		var pair [2]uint64
		if err := binary.Read(r, binary.NativeEndian, &pair); err != nil {
			return nil, err
		}
		if pair[0] == 0 {
			return auxv, nil
		}
		auxv[pair[0]] = pair[1]
	}
}
