package vm

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"
)

// koFile returns a kernel module that holds nothing but its .modinfo.
func koFile(info ...string) []byte { return koFileFor(elf.EM_X86_64, info...) }

func koFileFor(machine elf.Machine, info ...string) []byte {
	modinfo := []byte(strings.Join(info, "\x00") + "\x00")
	names := []byte("\x00.modinfo\x00.shstrtab\x00")
	var b bytes.Buffer
	const head, section = 64, 64
	put := func(v any) { binary.Write(&b, binary.LittleEndian, v) }
	h := elf.Header64{Type: uint16(elf.ET_REL), Machine: uint16(machine), Version: 1,
		Shoff: uint64(head + len(modinfo) + len(names)), Ehsize: head, Shentsize: section, Shnum: 3, Shstrndx: 2}
	copy(h.Ident[:], "\x7fELF\x02\x01\x01")
	put(h)
	b.Write(modinfo)
	b.Write(names)
	put(elf.Section64{})
	put(elf.Section64{Name: 1, Type: uint32(elf.SHT_PROGBITS), Off: head, Size: uint64(len(modinfo))})
	put(elf.Section64{Name: 10, Type: uint32(elf.SHT_STRTAB), Off: uint64(head + len(modinfo)), Size: uint64(len(names))})
	return b.Bytes()
}

// bzImage returns the start of a kernel image.
func bzImage(release string) []byte {
	b := make([]byte, 0x400)
	b[0x1fe], b[0x1ff] = 0x55, 0xaa
	copy(b[0x202:], "HdrS")
	binary.LittleEndian.PutUint16(b[0x20e:], 0x100)
	copy(b[0x300:], release+" (someone@somewhere) #1 SMP")
	return b
}

// arm64Image returns the start of a kernel image for aarch64.
func arm64Image() []byte {
	b := make([]byte, 0x400)
	copy(b, "MZ")
	copy(b[56:], "ARM\x64")
	return b
}

// zbootImage returns a kernel image in an EFI program that unpacks it.
func zbootImage(t testing.TB, compression, ext string, image []byte) []byte {
	b := make([]byte, 0x100)
	copy(b, "MZ\x00\x00zimg")
	packed := compress(t, ext, image)
	binary.LittleEndian.PutUint32(b[8:], uint32(len(b)))
	binary.LittleEndian.PutUint32(b[12:], uint32(len(packed)))
	copy(b[24:], compression+"\x00")
	copy(b[56:], "\xcd\x23\x82\x81") // what loaders look at there
	return append(append(b, packed...), "what is signed"...)
}

// elfProgram returns the start of a static program.
func elfProgram(machine elf.Machine) []byte {
	b := koFileFor(machine)
	binary.LittleEndian.PutUint16(b[16:], uint16(elf.ET_EXEC))
	return b
}

func compress(t testing.TB, ext string, data []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	var w io.WriteCloser
	var err error
	switch ext {
	case ".xz":
		w, err = xz.NewWriter(&b)
	case ".zst":
		w, err = zstd.NewWriter(&b)
	case ".gz":
		w = gzip.NewWriter(&b)
	default:
		return data
	}
	if err == nil {
		_, err = w.Write(data)
	}
	if err = errors.Join(err, w.Close()); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func writeFiles(t testing.TB, dir string, files map[string][]byte) {
	t.Helper()
	for name, data := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// kernelFiles is a small kernel as packages hold it.
func kernelFiles(release, ext string, t testing.TB) map[string][]byte {
	base := "lib/modules/" + release + "/kernel/"
	return map[string][]byte{
		"boot/vmlinuz-" + release:                    bzImage(release),
		base + "fs/erofs/erofs.ko" + ext:             compress(t, ext, koFile("license=GPL", "depends=libcrc32c")),
		base + "lib/libcrc32c.ko" + ext:              compress(t, ext, koFile("softdep=pre: crc32c", "depends=")),
		base + "crypto/crc32c_generic.ko" + ext:      compress(t, ext, koFile("alias=crc32c")),
		base + "drivers/virtio/virtio_pci.ko" + ext:  compress(t, ext, koFile("depends=virtio-ring,virtio")),
		base + "drivers/virtio/virtio_ring.ko" + ext: compress(t, ext, koFile("depends=virtio")),
		base + "drivers/virtio/virtio.ko" + ext:      compress(t, ext, koFile()),
		base + "drivers/net/unused.ko" + ext:         compress(t, ext, koFile("depends=virtio")),
		"usr/share/doc/linux/README":                 []byte("not a kernel"),
	}
}

func names(modules []module) []string {
	var out []string
	for _, m := range modules {
		out = append(out, m.name)
	}
	return out
}

func TestLoadModules(t *testing.T) {
	want := []string{"virtio", "virtio_ring", "virtio_pci", "crc32c_generic", "libcrc32c", "erofs"}
	for _, ext := range []string{"", ".xz", ".zst", ".gz"} {
		t.Run("ko"+ext, func(t *testing.T) {
			dir := t.TempDir()
			writeFiles(t, dir, kernelFiles("6.1.0", ext, t))
			modules, err := loadModules(filepath.Join(dir, "lib/modules/6.1.0"), guestModules)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(want, names(modules)); diff != "" {
				t.Error(diff)
			}
			for _, m := range modules {
				if !bytes.HasPrefix(m.data, []byte("\x7fELF")) {
					t.Errorf("%s is not unpacked", m.name)
				}
			}
		})
	}
}

func TestLoadModulesDamaged(t *testing.T) {
	for name, data := range map[string][]byte{
		"erofs.ko":     []byte("not ELF"),
		"erofs.ko.xz":  []byte("not xz"),
		"erofs.ko.zst": []byte("not zstd"),
		"erofs.ko.gz":  compress(t, ".gz", []byte("x"))[:5],
	} {
		dir := t.TempDir()
		writeFiles(t, dir, map[string][]byte{name: data})
		if _, err := loadModules(dir, guestModules); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Modules that need each other end up in some order, and nothing loops.
func TestLoadModulesCycle(t *testing.T) {
	dir := t.TempDir()
	writeFiles(t, dir, map[string][]byte{
		"erofs.ko": koFile("depends=a"), "a.ko": koFile("depends=b,erofs"), "b.ko": koFile("softdep=pre: a post: c"), "c.ko": koFile(),
	})
	modules, err := loadModules(dir, []string{"erofs", "erofs", "a"})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"b", "a", "erofs"}, names(modules)); diff != "" {
		t.Error(diff)
	}
}

// debFile returns a Debian package with the given files.
func debFile(t testing.TB, ext string, files map[string][]byte) []byte {
	t.Helper()
	var data bytes.Buffer
	w := tar.NewWriter(&data)
	for _, name := range slices.Sorted(maps.Keys(files)) {
		if err := w.WriteHeader(&tar.Header{Name: "./" + name, Mode: 0o644, Size: int64(len(files[name])), Format: tar.FormatGNU}); err != nil {
			t.Fatal(err)
		}
		w.Write(files[name])
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	b := bytes.NewBufferString("!<arch>\n")
	for _, m := range []struct {
		name string
		data []byte
	}{{"debian-binary", []byte("2.0\n")}, {"control.tar" + ext, []byte("odd")}, {"data.tar" + ext, compress(t, ext, data.Bytes())}} {
		fmt.Fprintf(b, "%-16s%-12d%-6d%-6d%-8s%-10d`\n", m.name, 0, 0, 0, "100644", len(m.data))
		b.Write(m.data)
		if len(m.data)%2 == 1 {
			b.WriteByte('\n')
		}
	}
	return b.Bytes()
}

// rpmFile returns an RPM package with the given files.
func rpmFile(t testing.TB, ext string, files map[string][]byte) []byte {
	t.Helper()
	var archive bytes.Buffer
	c := &cpioWriter{w: &archive}
	for _, name := range slices.Sorted(maps.Keys(files)) {
		c.bytes("./"+name, 0o100644, files[name])
	}
	c.bytes("TRAILER!!!", 0, nil)
	if c.err != nil {
		t.Fatal(c.err)
	}
	b := make([]byte, 96)
	copy(b, "\xed\xab\xee\xdb")
	head := func(entries, size int) {
		b = append(b, 0x8e, 0xad, 0xe8, 1, 0, 0, 0, 0)
		b = binary.BigEndian.AppendUint32(b, uint32(entries))
		b = binary.BigEndian.AppendUint32(b, uint32(size))
		b = append(b, make([]byte, 16*entries+size)...)
	}
	head(2, 13)
	b = append(b, 0, 0, 0) // the signature is aligned
	head(3, 21)
	return append(b, compress(t, ext, archive.Bytes())...)
}

func TestImport(t *testing.T) {
	const release = "6.1.0-56-cloud-amd64"
	files := kernelFiles(release, "", t)
	image, modules := map[string][]byte{}, map[string][]byte{}
	for name, data := range files {
		if strings.HasPrefix(name, "boot/") {
			image["usr/lib/modules/"+release+"/vmlinuz"] = data
		} else {
			modules["usr/"+name] = data
		}
	}
	for _, tt := range []struct {
		name, from string
		files      map[string][]byte
	}{
		{"deb, xz", "k.deb", map[string][]byte{"k.deb": debFile(t, ".xz", files)}},
		{"deb, zstd", "k.deb", map[string][]byte{"k.deb": debFile(t, ".zst", kernelFiles(release, ".xz", t))}},
		{"deb, gzip", "k.deb", map[string][]byte{"k.deb": debFile(t, ".gz", files)}},
		{"deb, plain", "k.deb", map[string][]byte{"k.deb": debFile(t, "", files)}},
		{"rpm, zstd", "k.rpm", map[string][]byte{"k.rpm": rpmFile(t, ".zst", files)}},
		{"rpm, xz", "k.rpm", map[string][]byte{"k.rpm": rpmFile(t, ".xz", files)}},
		{"rpm, plain", "k.rpm", map[string][]byte{"k.rpm": rpmFile(t, "", files)}},
		{"unpacked package", ".", files},
		{"split packages", ".", map[string][]byte{"linux-binary.deb": debFile(t, ".xz", image), "linux-modules.deb": debFile(t, ".zst", modules)}},
		{"image and modules", ".", map[string][]byte{"bzImage": bzImage(release), "m/erofs.ko": koFile()}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			from, state := t.TempDir(), t.TempDir()
			writeFiles(t, from, tt.files)
			for range 2 { // the second replaces the first
				got, err := Import(state, filepath.Join(from, tt.from))
				if err != nil {
					t.Fatal(err)
				}
				k := got.Kernel
				if k.Name != release || !k.Imported {
					t.Errorf("imported %+v", k)
				}
				if _, err := loadModules(k.Modules, guestModules); err != nil {
					t.Error(err)
				}
				if of, got, err := imageAt(k.Image); err != nil || got != release || of != archX8664 {
					t.Errorf("image %q, %v", got, err)
				}
				list, err := Kernels(state)
				if err != nil || len(list) < 1 || list[0] != k {
					t.Errorf("list: %+v, %v", list, err)
				}
				if found, err := findKernel(state, release, archX8664); err != nil || found != k {
					t.Errorf("find: %+v, %v", found, err)
				}
			}
			left, err := os.ReadDir(filepath.Join(state, kernelsDir))
			if err != nil || len(left) != 1 {
				t.Errorf("left in the state directory: %v, %v", left, err)
			}
		})
	}
}

// A kernel for aarch64 does not tell its release, its modules do; its image comes
// in several wrappings.
func TestImportAArch64(t *testing.T) {
	const debian = "6.1.0-50-cloud-arm64"
	for _, tt := range []struct {
		name, release, want string
		image               []byte
	}{
		{"plain", debian, debian, arm64Image()},
		{"gzip", debian, debian, compress(t, ".gz", arm64Image())},
		{"EFI, zstd", debian, debian, zbootImage(t, "zstd22", ".zst", arm64Image())},
		{"EFI, gzip", debian, debian, zbootImage(t, "gzip", ".gz", arm64Image())},
		{"NixOS", "6.12.8", "6.12.8-aarch64", arm64Image()},
	} {
		t.Run(tt.name, func(t *testing.T) {
			from, state := t.TempDir(), t.TempDir()
			writeFiles(t, from, map[string][]byte{
				"Image": tt.image, "erofs.ko": koFileFor(elf.EM_AARCH64, "vermagic="+tt.release+" SMP aarch64"),
				"bin/busybox": elfProgram(elf.EM_AARCH64), "share/busybox": []byte("not a program"),
			})
			got, err := Import(state, from)
			if err != nil {
				t.Fatal(err)
			}
			if got.Kernel.Name != tt.want || got.Kernel.Arch != "aarch64" || got.Shell != "aarch64" {
				t.Errorf("imported %+v", got)
			}
			if image, err := os.ReadFile(got.Kernel.Image); err != nil || !bytes.Equal(image, arm64Image()) {
				t.Errorf("image %.80q, %v", image, err)
			}
			if k, err := findKernel(state, "", archAArch64); err != nil || k != got.Kernel {
				t.Errorf("found %+v, %v", k, err)
			}
			// What names this kernel asks for no other one of the host's.
			if k, err := findKernel(state, tt.want, archX8664); err == nil && k.Arch != "x86_64" {
				t.Errorf("found %+v for x86_64", k)
			}
			if path, err := findShell(state, "", archAArch64); err != nil || path != shellPath(state, archAArch64) {
				t.Errorf("shell %q, %v", path, err)
			}
		})
	}
}

func TestImportShellAlone(t *testing.T) {
	dynamic := elfProgram(elf.EM_AARCH64)
	for _, tt := range []struct {
		data       []byte
		want, fail string
	}{
		{elfProgram(elf.EM_X86_64), "x86_64", ""},
		{elfProgram(elf.EM_RISCV), "", "EM_RISCV"},
		{dynamic[:40], "", "import busybox"},
		{[]byte("#!/bin/sh"), "", "no kernel image"},
	} {
		from, state := filepath.Join(t.TempDir(), "b.deb"), t.TempDir()
		writeFiles(t, filepath.Dir(from), map[string][]byte{"b.deb": debFile(t, ".xz", map[string][]byte{"bin/busybox": tt.data})})
		got, err := Import(state, from)
		if tt.fail != "" {
			if err == nil || !strings.Contains(err.Error(), tt.fail) {
				t.Errorf("%v, want %q", err, tt.fail)
			}
		} else if err != nil || got.Shell != tt.want || got.Kernel.Name != "" {
			t.Errorf("%+v, %v", got, err)
		}
	}
}

func TestImportRefused(t *testing.T) {
	good := kernelFiles("6.1.0", "", t)
	two := kernelFiles("6.1.0", "", t)
	two["boot/vmlinuz-6.12.0"] = bzImage("6.12.0")
	for _, tt := range []struct {
		name, file string
		data       []byte
		want       string
	}{
		{"no package", "k.deb", []byte("hello"), "not a Debian package"},
		{"no package", "k.rpm", []byte("hello"), "not an RPM package"},
		{"cut off", "k.deb", debFile(t, ".xz", good)[:500], ""},
		{"cut off", "k.rpm", rpmFile(t, ".xz", good)[:500], ""},
		{"no data", "k.deb", []byte("!<arch>\n"), "no data.tar"},
		{"no image", "k.deb", debFile(t, "", map[string][]byte{"lib/a.ko": koFile()}), "no kernel image"},
		{"no modules", "k.deb", debFile(t, "", map[string][]byte{"boot/vmlinuz-1": bzImage("6.1.0")}), "no kernel modules"},
		{"two kernels", "k.deb", debFile(t, "", two), "several kernels"},
		{"evil release", "k.deb", debFile(t, "", map[string][]byte{"boot/vmlinuz": bzImage("6/../../x")}), "bad kernel release"},
		{"hidden release", "k.deb", debFile(t, "", map[string][]byte{"boot/vmlinuz": bzImage("..")}), "bad kernel release"},
		{"modules for another machine", "k.deb", debFile(t, "", map[string][]byte{"boot/vmlinuz": bzImage("6.1.0"), "a.ko": koFileFor(elf.EM_AARCH64)}), "another machine"},
		{"modules for another kernel", "k.deb", debFile(t, "", map[string][]byte{"boot/vmlinuz": bzImage("6.1.0"), "a.ko": koFile("vermagic=6.12.0 SMP")}), "modules are for \"6.12.0\""},
		{"modules that do not tell", "k.deb", debFile(t, "", map[string][]byte{"boot/vmlinuz": arm64Image(), "a.ko": koFileFor(elf.EM_AARCH64)}), "bad kernel release"},
		{"modules that lie", "k.deb", debFile(t, "", map[string][]byte{"boot/vmlinuz": arm64Image(), "a.ko": koFileFor(elf.EM_AARCH64, "vermagic=../x SMP")}), "bad kernel release"},
		{"unknown compression", "k.deb", debFile(t, "", map[string][]byte{"boot/vmlinuz": zbootImage(t, "lzo", "", arm64Image())}), "compressed by"},
		{"not an image", "vmlinuz", []byte("hello"), "not a kernel image"},
	} {
		t.Run(tt.name+" "+tt.file, func(t *testing.T) {
			from, state := filepath.Join(t.TempDir(), tt.file), t.TempDir()
			if err := os.WriteFile(from, tt.data, 0o644); err != nil {
				t.Fatal(err)
			}
			_, err := Import(state, from)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Fatalf("got %v, want %q", err, tt.want)
			}
			if left, _ := os.ReadDir(filepath.Join(state, kernelsDir)); len(left) != 0 {
				t.Errorf("left behind: %v", left)
			}
		})
	}
}

// Names in a package lead nowhere.
func TestImportKeepsInside(t *testing.T) {
	files := kernelFiles("6.1.0", "", t)
	files["../../../../evil.ko"] = koFile()
	dir := t.TempDir()
	from, state := filepath.Join(dir, "k.deb"), filepath.Join(dir, "a/b/state")
	writeFiles(t, dir, map[string][]byte{"k.deb": debFile(t, "", files)})
	got, err := Import(state, from)
	if err != nil {
		t.Fatal(err)
	}
	k := got.Kernel
	if _, err := os.Stat(filepath.Join(k.Modules, "evil.ko")); err != nil {
		t.Error(err)
	}
}

func TestHostKernels(t *testing.T) {
	for _, tt := range []struct {
		name  string
		files []string
		want  []string // images
	}{
		{"Debian", []string{"boot/vmlinuz-6.1.0-9-amd64", "lib/modules/6.1.0-9-amd64/kernel/a.ko",
			"boot/vmlinuz-6.1.0-10-amd64", "lib/modules/6.1.0-10-amd64/kernel/a.ko", "lib/modules/5.0/kernel/left.ko"},
			[]string{"boot/vmlinuz-6.1.0-10-amd64", "boot/vmlinuz-6.1.0-9-amd64"}},
		{"Fedora", []string{"usr/lib/modules/6.12.9-200.fc41/vmlinuz", "usr/lib/modules/6.12.9-200.fc41/kernel/a.ko.xz"},
			[]string{"usr/lib/modules/6.12.9-200.fc41/vmlinuz"}},
		{"NixOS", []string{"run/booted-system/kernel", "run/booted-system/kernel-modules/lib/modules/6.12.8/kernel/a.ko.xz",
			"run/current-system/kernel", "run/current-system/kernel-modules/lib/modules/6.12.8/kernel/a.ko.xz"},
			[]string{"run/booted-system/kernel"}},
		{"none", nil, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			root := t.TempDir()
			for _, f := range tt.files {
				writeFiles(t, root, map[string][]byte{f: nil})
			}
			var got []string
			for _, k := range hostKernels(root) {
				got = append(got, strings.TrimPrefix(k.Image, root+"/"))
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestFindKernelMissing(t *testing.T) {
	_, err := findKernel(t.TempDir(), "6.99-nowhere", archX8664)
	var missing *MissingError
	if !errors.As(err, &missing) || !strings.Contains(err.Error(), "6.99-nowhere") || !strings.Contains(err.Error(), "nbd kernel import") {
		t.Errorf("got %v", err)
	}
}

func TestCompareVersions(t *testing.T) {
	ordered := []string{"5.10.0", "6.1.0-9-amd64", "6.1.0-10-amd64", "6.1.0-10-cloud", "6.9", "6.12", "6.12.9-200.fc41", "10.0"}
	for i := range ordered {
		for j := range ordered {
			got := compareVersions(ordered[i], ordered[j])
			if want := cmpInt(i, j); got != want {
				t.Errorf("%s, %s: %d, want %d", ordered[i], ordered[j], got, want)
			}
		}
	}
}

func cmpInt(i, j int) int {
	switch {
	case i < j:
		return -1
	case i > j:
		return 1
	}
	return 0
}

func FuzzImportDeb(f *testing.F) {
	small := map[string][]byte{"boot/vmlinuz-6.1.0": bzImage("6.1.0"), "lib/a.ko": koFile("depends=b")}
	for _, ext := range []string{"", ".gz", ".xz", ".zst"} {
		f.Add(debFile(f, ext, small))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		readDeb(bytes.NewReader(data), func(name string, r io.Reader) error {
			_, err := io.Copy(io.Discard, io.LimitReader(r, 1<<20))
			return err
		})
	})
}

func FuzzImportRPM(f *testing.F) {
	small := map[string][]byte{"boot/vmlinuz-6.1.0": bzImage("6.1.0"), "lib/a.ko": koFile("depends=b")}
	for _, ext := range []string{"", ".gz", ".xz", ".zst"} {
		f.Add(rpmFile(f, ext, small))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		readRPM(bytes.NewReader(data), func(name string, r io.Reader) error {
			_, err := io.Copy(io.Discard, io.LimitReader(r, 1<<20))
			return err
		})
	})
}

func FuzzKernelImage(f *testing.F) {
	f.Add(bzImage("6.1.0-56-cloud-amd64"))
	f.Add(bzImage("../x"))
	f.Add(zbootImage(f, "zstd", ".zst", bzImage("6.1.0")))
	f.Add(arm64Image())
	f.Fuzz(func(t *testing.T, head []byte) {
		b, err := plainImage(bytes.NewReader(head))
		if err != nil {
			return
		}
		if head, err = io.ReadAll(io.LimitReader(b, imageHead)); err != nil {
			return
		}
		_, name, err := identifyImage(head)
		if err == nil && (strings.ContainsAny(name, "/\x00") || strings.HasPrefix(name, ".")) {
			t.Errorf("release %q", name)
		}
	})
}

func FuzzModinfo(f *testing.F) {
	f.Add(koFile("license=GPL", "depends=a-b,c", "softdep=pre: crc32c d post: e"))
	f.Add(koFile("depends="))
	f.Fuzz(func(t *testing.T, data []byte) {
		needs, err := moduleNeeds(data)
		if err != nil {
			return
		}
		for _, n := range needs {
			if n == "" || strings.ContainsAny(n, "-\x00") {
				t.Errorf("need %q", n)
			}
		}
	})
}
