/* Which instructions of a program run between its two marks: the tracer of ports.py and cycles.py.
 *
 *     trace counts|order PROGRAM ARGUMENT...
 *
 * prints the program's memory map at the first mark, an empty line, and then an address and a count
 * per line, or the addresses in the order in which they ran. A mark is a breakpoint (int3). The
 * program runs one instruction at a time, some 50 000 a second, so the call has to be short; unlike
 * valgrind, every instruction set of the machine will do. */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

static void fail(const char* what) {
  perror(what);
  exit(1);
}

/* The second mark stands behind the first, in the same function. */
enum { NEAR = 1 << 12 };

/* Open addressing; a call touches some ten thousand addresses. */
enum { PLACES = 1 << 20 };
static struct {
  uintptr_t address;
  long times;
} place[PLACES];

static void count(uintptr_t address) {
  size_t i = address * 0x9e3779b97f4a7c15u >> 44;
  while (place[i].times && place[i].address != address) i = (i + 1) % PLACES;
  place[i].address = address;
  place[i].times++;
}

static uintptr_t instruction_pointer(pid_t pid) {
  errno = 0;
  const long rip = ptrace(PTRACE_PEEKUSER, pid, (void*)offsetof(struct user, regs.rip), NULL);
  if (errno) fail("PTRACE_PEEKUSER");
  return (uintptr_t)rip;
}

static int is_mark(pid_t pid, uintptr_t address) {
  errno = 0;
  const long code = ptrace(PTRACE_PEEKTEXT, pid, (void*)address, NULL);
  if (errno) fail("PTRACE_PEEKTEXT");
  return (code & 0xff) == 0xcc;
}

static void print_map(pid_t pid) {
  char name[64], line[1024];
  snprintf(name, sizeof name, "/proc/%d/maps", pid);
  FILE* map = fopen(name, "r");
  if (!map) fail(name);
  while (fgets(line, sizeof line, map)) fputs(line, stdout);
  fclose(map);
  putchar('\n');
}

/* Waits for the next trap: of a mark, or after an instruction. */
static void wait_for_trap(pid_t pid) {
  int status;
  if (waitpid(pid, &status, 0) != pid) fail("waitpid");
  if (WIFSTOPPED(status) && WSTOPSIG(status) == SIGTRAP) return;
  if (WIFSTOPPED(status))
    fprintf(stderr, "signal %d between the marks\n", WSTOPSIG(status));
  else
    fprintf(stderr, "the program ended before its second mark\n");
  exit(1);
}

int main(int argc, char** argv) {
  if (argc < 3) return 2;
  const int in_order = !strcmp(argv[1], "order");
  if (!in_order && strcmp(argv[1], "counts")) return 2;
  const pid_t pid = fork();
  if (pid < 0) fail("fork");
  if (pid == 0) {
    if (ptrace(PTRACE_TRACEME, 0, NULL, NULL)) fail("PTRACE_TRACEME");
    execv(argv[2], argv + 2);
    fail(argv[2]);
  }
  wait_for_trap(pid); /* at its first instruction */
  ptrace(PTRACE_SETOPTIONS, pid, NULL, PTRACE_O_EXITKILL);
  if (ptrace(PTRACE_CONT, pid, NULL, NULL)) fail("PTRACE_CONT");
  wait_for_trap(pid); /* at its first mark */
  print_map(pid);
  const uintptr_t first = instruction_pointer(pid);
  for (;;) {
    const uintptr_t address = instruction_pointer(pid);
    if (address - first < NEAR && is_mark(pid, address)) break; /* the second */
    if (in_order)
      printf("%lx\n", (unsigned long)address);
    else
      count(address);
    if (ptrace(PTRACE_SINGLESTEP, pid, NULL, NULL)) fail("PTRACE_SINGLESTEP");
    wait_for_trap(pid);
  }
  kill(pid, SIGKILL);
  for (size_t i = 0; i < PLACES; i++)
    if (place[i].times) printf("%lx %ld\n", (unsigned long)place[i].address, place[i].times);
  return 0;
}
